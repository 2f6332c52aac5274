"""Documents with one id in several parts: ids alone are read, and compared by DuckDB, which can spill to disk."""

import glob
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.remote import RemoteFile
from schemas.files import is_remote
from schemas.manifest import signals_path

READERS = 32  # parts of a store that are read at a time
FOOTER = 1 << 16  # bytes at a part's end, where its index is
IDS = pa.schema([("part", pa.string()), ("row", pa.int64()), ("doc_id", pa.string())])


SQL = """
    WITH ids AS ({ids}), repeated AS (SELECT doc_id FROM ids GROUP BY doc_id HAVING count(*) > 1)
    SELECT part, row FROM ids SEMI JOIN repeated USING (doc_id)
    QUALIFY row_number() OVER (PARTITION BY doc_id ORDER BY part, row) > 1 ORDER BY part, row
"""
LOCAL = """
    SELECT filename AS part, file_row_number AS row, doc_id
    FROM read_parquet(?, filename = true, file_row_number = true)
"""


def duplicates(dataset: Path, parts: dict[str, int]) -> dict[str, list[int]]:
    """The rows of parts whose id stands in an earlier one: by part, both in order. `parts` are names and bytes."""
    if not parts:
        return {}
    with tempfile.TemporaryDirectory(prefix="lacy-") as spill, duckdb.connect(config={"threads": 2}) as connection:
        connection.execute("SET temp_directory = ?", [spill])
        if is_remote(dataset):
            connection.register("stored", pa.RecordBatchReader.from_batches(IDS, _ids(dataset, parts)))
            connection.execute("CREATE TEMP TABLE stored_ids AS FROM stored")
            rows = connection.execute(SQL.format(ids="FROM stored_ids")).fetchall()
        else:
            files = [glob.escape(str(signals_path(dataset, name))) for name in parts]
            rows = connection.execute(SQL.format(ids=LOCAL), [files]).fetchall()
    found: dict[str, list[int]] = {}
    for part, row in rows:
        found.setdefault(Path(part).stem, []).append(row)
    return found


def _ids(dataset: Path, parts: dict[str, int]) -> Iterator[pa.RecordBatch]:
    """The ids of all parts, many parts at a time."""
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque[Future[pa.RecordBatch]] = deque()
        for name, size in parts.items():
            ahead.append(pool.submit(_ids_of, dataset, name, size))
            if len(ahead) > 2 * READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _ids_of(dataset: Path, name: str, size: int) -> pa.RecordBatch:
    file = RemoteFile(str(signals_path(dataset, name)), max(0, size - FOOTER), size, size=size)
    ids = pq.ParquetFile(file).read(["doc_id"], use_threads=False)["doc_id"].combine_chunks()
    return pa.record_batch([pa.repeat(name, len(ids)), pa.array(range(len(ids)), pa.int64()), ids], schema=IDS)
