"""The Parquet files of a dataset: Arrow schemas, and one way to write them.

One row is one document; a list has one entry per token of the document. The code table of a column is stored as a JSON
list in the metadata of its field, for readers of Arrow, and in that of the file as `codes.<column>`, for all others.
"""

import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from lacy.schemas import codes

SCHEMA_VERSION = 1
CODES = b"codes"  # key of a field's metadata that holds its code table


def _coded(name: str, of: pa.DataType, table: Sequence[str]) -> pa.Field:
    """A column of one code for each token; the code is an index into `table`."""
    return pa.field(name, pa.list_(of), nullable=False, metadata={CODES: json.dumps(table)})


SIGNALS = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),  # unique in the dataset
        pa.field("source", pa.string(), nullable=False),  # file, and position in it
        pa.field("text", pa.large_string()),  # as tokenised
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("token_starts", pa.list_(pa.int32()), nullable=False),  # characters of text, half open
        pa.field("token_ends", pa.list_(pa.int32()), nullable=False),
        pa.field("factual", pa.list_(pa.bool_()), nullable=False),
        _coded("pos", pa.uint8(), codes.POS),
        _coded("ent_type", pa.uint8(), codes.ENT_TYPES),
        pa.field("ref_nll", pa.list_(pa.float32()), nullable=False),  # nats; null where there is no score
        pa.field("ref_correct", pa.list_(pa.bool_())),  # the reference's most likely token is this one
        pa.field("student_nll", pa.list_(pa.float32())),
        pa.field("judge", pa.list_(pa.float32())),  # 0 to 1: how much the LLM judge marks it; null where it gave none
    ]
)
LABELS = pa.schema(
    [
        SIGNALS.field("doc_id"),
        SIGNALS.field("token_ids"),
        _coded("label", pa.int8(), codes.LABELS),
        SIGNALS.field("factual"),
        SIGNALS.field("ref_nll"),
        SIGNALS.field("student_nll"),
        SIGNALS.field("judge"),
    ]
)
OPTIONAL = ("text", "ref_correct", "student_nll", "judge")
TOKEN_COLUMNS = tuple(field.name for field in SIGNALS if pa.types.is_list(field.type))

# Measured on labelled Wikipedia: codes repeat, offsets rise, losses share exponents, zstd does best with plain ids.
_DICTIONARY = {"label", "pos", "ent_type", "judge"}
_ENCODING = {
    "token_starts": "DELTA_BINARY_PACKED",
    "token_ends": "DELTA_BINARY_PACKED",
    "ref_nll": "BYTE_STREAM_SPLIT",
    "student_nll": "BYTE_STREAM_SPLIT",
}


def select(schema: pa.Schema, present: Sequence[str]) -> pa.Schema:
    """`schema` without the optional columns that are not `present`."""
    return pa.schema([field for field in schema if field.name not in OPTIONAL or field.name in present])


def to_parquet(table: pa.Table) -> pa.Buffer:
    """The bytes of one part file. The same table gives the same bytes."""
    schema = table.schema
    tables = {field.name: field.metadata[CODES] for field in schema if CODES in (field.metadata or {})}
    table = table.replace_schema_metadata({f"codes.{name}": content for name, content in tables.items()})

    def path(name: str) -> str:
        return f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name

    names = [name for name in schema.names if name in _ENCODING]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, table.num_rows),
        compression="zstd",
        compression_level=9,
        use_dictionary=[path(name) for name in schema.names if name in _DICTIONARY],
        column_encoding={path(name): _ENCODING[name] for name in names},
        write_page_index=True,
        store_schema=True,
    )
    return sink.getvalue()
