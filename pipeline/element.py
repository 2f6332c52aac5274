"""The element of the labelling graph, and its encoding between machines."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from lacy.labelers.tokenize import Tokens
from lacy.pipeline.corpus.deadletters import DeadLetter, Fault, dead_letter, position_of
from lacy.pipeline.corpus.sources import Range


@dataclass(frozen=True)
class Part:
    """A part that is being labelled: its range, its documents (columns of lacy.schemas.parts.SIGNALS), dead letters."""

    range: Range
    batch: pa.RecordBatch
    bad: tuple[DeadLetter, ...] = ()
    skipped: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> seconds of work
    scored: dict[str, str] = field(default_factory=dict)  # role -> the engine's path to log-probabilities
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

    def without(self, faults: dict[int, Fault]) -> "Part":
        """Turn rows into dead letters."""
        if not faults:
            return self
        keep = np.setdiff1d(np.arange(len(self)), list(faults))
        ids, sources = self.batch.column("doc_id"), self.batch.column("source")
        bad = tuple(
            dead_letter(self.range.source, position_of(sources[row].as_py()), fault, ids[row].as_py())
            for row, fault in sorted(faults.items())
        )
        return replace(self, batch=self.batch.take(pa.array(keep)), bad=self.bad + bad)


class PartCoder(beam.coders.Coder):
    """Encodes a part as an Arrow IPC stream; fields other than the batch are in the schema's metadata.

    Arrow pickles a slice with its whole parent; IPC writes only the rows. zstd, because services charge for shuffled
    bytes: a MiB of corpus, 240K tokens, takes 1.8 MB instead of 4.5.
    """

    def encode(self, value: Part) -> bytes:
        about = {name: getattr(value, name) for name in ("skipped", "seconds", "scored", "judged")}
        about |= {"range": asdict(value.range), "bad": [asdict(letter) for letter in value.bad]}
        batch = value.batch.replace_schema_metadata({"part": json.dumps(about, sort_keys=True)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
            stream.write_batch(batch)
        return sink.getvalue().to_pybytes()

    def decode(self, encoded: bytes) -> Part:
        with pa.ipc.open_stream(encoded) as stream:
            batch = stream.read_next_batch()
        about: dict[str, Any] = json.loads(batch.schema.metadata[b"part"])
        about |= {"range": Range(**about["range"]), "bad": tuple(DeadLetter(**letter) for letter in about["bad"])}
        return Part(batch=batch.replace_schema_metadata(None), **about)

    def estimate_size(self, value: Part) -> int:
        """A size for Beam's metrics, which ask at every step, without encoding the part."""
        return value.batch.nbytes

    def is_deterministic(self) -> bool:
        return True


beam.coders.registry.register_coder(Part, PartCoder)
