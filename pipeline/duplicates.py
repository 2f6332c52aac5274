"""Find documents of several parts that share an id: only ids are read; DuckDB, which can spill to disk, compares."""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lacy.schemas.files import is_remote
from lacy.schemas.manifest import signals_path
from lacy.schemas.remote import RemoteFile

READERS, LOCAL_READERS = 32, 2  # parts read at a time, from a store and from a folder
TOGETHER = 1024  # parts whose ids make one record batch
FOOTER = 1 << 16  # bytes at the end of a part that hold its index
IDS = pa.schema([("part", pa.string()), ("row", pa.int64()), ("doc_id", pa.string())])
SQL = """
    WITH repeated AS (SELECT doc_id FROM ids GROUP BY doc_id HAVING count(*) > 1)
    SELECT part, row FROM ids SEMI JOIN repeated USING (doc_id)
    QUALIFY row_number() OVER (PARTITION BY doc_id ORDER BY part, row) > 1 ORDER BY part, row
"""


def duplicates(dataset: Path, parts: dict[str, int]) -> dict[str, list[int]]:
    """Rows whose id occurs earlier in the corpus, by part, both in order. `parts` maps names to bytes."""
    if not parts:
        return {}
    with tempfile.TemporaryDirectory(prefix="lacy-") as spill, duckdb.connect(config={"threads": 2}) as connection:
        connection.execute("SET temp_directory = ?", [spill])
        connection.register("read", pa.RecordBatchReader.from_batches(IDS, _ids(dataset, parts)))
        connection.execute("CREATE TEMP TABLE ids AS FROM read")
        rows = connection.execute(SQL).fetchall()
    repeated: dict[str, list[int]] = {}
    for part, row in rows:
        repeated.setdefault(part, []).append(row)
    return repeated


def _ids(dataset: Path, parts: dict[str, int]) -> Iterator[pa.RecordBatch]:
    """The ids of all parts, in batches of parts."""
    names = list(parts)
    with ThreadPoolExecutor(READERS if is_remote(dataset) else LOCAL_READERS) as pool:
        for at in range(0, len(names), TOGETHER):
            some = names[at : at + TOGETHER]
            read = list(pool.map(lambda name: _ids_of(signals_path(dataset, name), parts[name]), some))
            lengths = [len(ids) for ids in read]
            ids = pa.concat_arrays(read)
            rows = np.arange(len(ids)) - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
            yield pa.record_batch([pa.array(np.repeat(some, lengths), pa.string()), pa.array(rows), ids], schema=IDS)


def _ids_of(path: Path, size: int) -> pa.Array:
    reader = pq.ParquetReader()  # ParquetFile wraps it, at a cost that shows with small files
    if is_remote(path):
        file: Any = RemoteFile(str(path), max(0, size - FOOTER), size, size=size)
        reader.open(pa.PythonFile(file, "r"), use_memory_map=False, pre_buffer=False)
    else:
        reader.open(str(path), use_memory_map=True, pre_buffer=False)
    return reader.read_all([reader.schema_arrow.names.index("doc_id")], use_threads=False)["doc_id"].combine_chunks()
