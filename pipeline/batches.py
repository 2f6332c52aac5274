"""Batches of parts, so that many small parts are not as many small computations."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lacy.schemas.manifest import PartRecord

PARTS, TOKENS = 256, 1 << 20  # a batch ends with the part that reaches one of them


def batches(records: Sequence[PartRecord]) -> Iterator[list[PartRecord]]:
    """Divide parts into batches, in order."""
    batch: list[PartRecord] = []
    tokens = 0
    for record in records:
        batch.append(record)
        tokens += record.tokens
        if len(batch) == PARTS or tokens >= TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def parse(content: bytes, wanted: Collection[str] | None = None) -> pa.Table:
    """The table in a Parquet file, or its `wanted` columns. Raises OSError or ArrowException for another file."""
    reader = pq.ParquetReader()  # ParquetFile wraps it, at a cost that shows with small files
    reader.open(pa.BufferReader(content), use_memory_map=False, pre_buffer=False)
    columns = None if wanted is None else [at for at, name in enumerate(reader.schema_arrow.names) if name in wanted]
    return reader.read_all(columns, use_threads=False)


def join(tables: Sequence[pa.Table]) -> dict[str, Any]:
    """The columns of all tables as arrays. The tables have the same columns."""
    joined = pa.concat_tables(tables)
    return {name: joined[name].combine_chunks() for name in joined.schema.names}


def bounds(offsets: npt.NDArray[Any], tables: Sequence[pa.Table]) -> list[tuple[int, int]]:
    """The half-open token range of each table; `offsets` are those of the joined documents."""
    ends = np.cumsum([0, *(table.num_rows for table in tables)])
    return list(zip(offsets[ends[:-1]].tolist(), offsets[ends[1:]].tolist(), strict=True))
