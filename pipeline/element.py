"""The element that flows through the labelling graph."""

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from labelers.tokenize import Tokens
from pipeline.readers import Bad
from pipeline.sources import Range


@dataclass(frozen=True)
class Part:
    """One part on its way: its range, its documents so far (columns of schemas.parts.SIGNALS), and what is bad.

    The batch is never a slice: Arrow would pickle the whole parent with it.
    """

    range: Range
    batch: pa.RecordBatch
    bad: tuple[Bad, ...] = ()
    skipped: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # of work by stage
    scored: dict[str, str] = field(default_factory=dict)  # how each scorer asked its engine: role -> path
    judged: dict[str, int] = field(default_factory=dict)  # the judge's windows and spans, counted

    def __len__(self) -> int:
        return self.batch.num_rows

    def tokens(self) -> Tokens:
        """The tokens of all documents, as arrays that share memory with the batch."""
        ids, starts, ends = (self.batch.column(name) for name in ("token_ids", "token_starts", "token_ends"))
        return Tokens(
            offsets=ids.offsets.to_numpy().astype(np.int64),
            ids=ids.values.to_numpy(),
            starts=starts.values.to_numpy(),
            ends=ends.values.to_numpy(),
        )

    def texts(self) -> list[str]:
        return self.batch.column("text").to_pylist()

    def with_columns(self, **columns: pa.Array) -> "Part":
        batch = self.batch
        for name, column in columns.items():
            batch = batch.append_column(name, column)
        return replace(self, batch=batch)

    def timed(self, stage: str, seconds: float) -> "Part":
        return replace(self, seconds=self.seconds | {stage: seconds})

    def without(self, errors: dict[int, str]) -> "Part":
        """Move rows to the bad documents, each with its reason."""
        if not errors:
            return self
        keep = np.setdiff1d(np.arange(len(self)), list(errors))
        ids, sources = self.batch.column("doc_id"), self.batch.column("source")
        bad = tuple(
            Bad(self.range.source, int(sources[row].as_py().rpartition(":")[2]), reason, ids[row].as_py())
            for row, reason in sorted(errors.items())
        )
        return replace(self, batch=self.batch.take(pa.array(keep)), bad=self.bad + bad)
