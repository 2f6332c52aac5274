"""Part files say by themselves what their codes stand for."""

import json

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from lacy.schemas.codes import ENT_TYPES, LABELS, POS
from lacy.schemas.parts import CODES, SIGNALS, select, to_parquet
from lacy.schemas.parts import LABELS as LABEL_SCHEMA

TABLES = {"pos": POS, "ent_type": ENT_TYPES, "label": LABELS}


def test_code_tables_are_metadata_of_the_field_and_of_the_file(tmp_path):
    for schema in (select(SIGNALS, ["text"]), select(LABEL_SCHEMA, [])):
        path = tmp_path / "part.parquet"
        path.write_bytes(to_parquet(schema.empty_table()))
        tables = {name: table for name, table in TABLES.items() if name in schema.names}
        read = pq.read_schema(path)
        assert {field.name: tuple(json.loads(field.metadata[CODES])) for field in read if field.metadata} == tables
        keys = f"SELECT decode(key), decode(value) FROM parquet_kv_metadata('{path}') WHERE decode(key) LIKE 'codes.%'"
        assert {key: tuple(json.loads(value)) for key, value in duckdb.sql(keys).fetchall()} == {
            f"codes.{name}": table for name, table in tables.items()
        }


def test_metadata_does_not_tell_part_files_apart():
    older = pa.schema([field.remove_metadata() for field in LABEL_SCHEMA])
    assert older.equals(LABEL_SCHEMA)
    assert pq.read_schema(pa.BufferReader(to_parquet(older.empty_table()))).equals(LABEL_SCHEMA)
