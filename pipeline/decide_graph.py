"""The graph of `lacy decide`: count priorities over all parts, refine the threshold, write the labels.

parts -> count -> merge -> refine -> count -> merge -> refine -> ... -> threshold -> write labels
"""

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import TypeAdapter

from lacy.labelers import policies
from lacy.labelers.policies import Selection
from lacy.pipeline.batches import bounds, join, parse
from lacy.pipeline.runners.packed import listed
from lacy.schemas.codes import DELEGATE, IGNORE
from lacy.schemas.files import read_many, sha256, write_atomic
from lacy.schemas.manifest import RECORDS, LabelRecord, labels_path, signals_path
from lacy.schemas.parts import LABELS, select, to_parquet

WRITERS = 16  # threads that encode and write the parts of a batch
RECORD_LIST = TypeAdapter(list[LabelRecord])
SIGNALS = ("factual", "ref_nll", "student_nll", "judge")  # what policies may read
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Decision:
    """A decision for the workers to carry out."""

    dataset: Path
    name: str
    policy: str
    budget: float | None
    action: str
    seed: int
    tokens: int

    @property
    def folder(self) -> Path:
        return self.dataset / "labels" / self.name


def build(pipeline: beam.Pipeline, decision: Decision, planned: list[list[str]]) -> None:
    """Add the graph to a pipeline. `planned` are batches of part names."""
    parts = listed(pipeline, "parts", planned, list)
    start = policies.start(decision.policy, decision.tokens, decision.budget)
    selection = pipeline | "start" >> beam.Create([start])
    passes = policies.PASSES if policies.POLICIES[decision.policy].budgeted else 0
    for number in range(1, passes + 1):
        counts = (
            parts
            | f"spread {number}" >> beam.Reshuffle()
            | f"count {number}" >> beam.Map(_count, beam.pvalue.AsSingleton(selection), decision)
            | f"merge {number}" >> beam.CombineGlobally(_Sum())
        )
        selection = selection | f"refine {number}" >> beam.Map(_refine, beam.pvalue.AsSingleton(counts))
    _ = parts | "spread" >> beam.Reshuffle() | "write" >> beam.Map(_write, beam.pvalue.AsSingleton(selection), decision)


class _Sum(beam.CombineFn):
    """Adds up the histograms of parts, in any order."""

    def create_accumulator(self) -> Counts:
        return np.zeros(policies.BINS, np.int64)

    def add_input(self, accumulator: Counts, element: Counts) -> Counts:
        return accumulator + element

    def merge_accumulators(self, accumulators: Iterable[Counts]) -> Counts:
        return np.sum(list(accumulators), axis=0, dtype=np.int64)

    def extract_output(self, accumulator: Counts) -> Counts:
        return accumulator


def _count(batch: list[str], selection: Selection, decision: Decision) -> Counts:
    if selection.finished:
        return np.zeros(policies.BINS, np.int64)
    columns = join(_read(decision, batch, ("doc_id", "token_ids", *SIGNALS)))
    return policies.count(*policies.priorities(decision.policy, *_signals(columns), seed=decision.seed), selection)


def _refine(selection: Selection, counts: Counts) -> Selection:
    return selection if selection.finished else policies.refine(selection, counts)


def _write(batch: list[str], selection: Selection, decision: Decision) -> None:
    """Write a batch of parts of the label set, then their records."""
    tables = _read(decision, batch, LABELS.names)
    columns = join(tables)
    signals = _signals(columns)
    threshold = selection.threshold if policies.POLICIES[decision.policy].budgeted else policies.EVERYTHING
    label = policies.label(decision.policy, *signals, threshold, decision.action, seed=decision.seed)
    candidates, _ = policies.keys(decision.policy, *signals, seed=decision.seed)
    scores = policies.scores(decision.policy, signals[0])

    def write(part: str, table: pa.Table, span: tuple[int, int]) -> LabelRecord:
        of_part = slice(*span)
        data = _parquet(table, label[of_part])
        write_atomic(labels_path(decision.dataset, decision.name, part), data)
        counts = np.bincount(label[of_part], minlength=3)
        return LabelRecord(
            name=part,
            rows=table.num_rows,
            tokens=len(label[of_part]),
            candidates=int(candidates[of_part].sum()),
            delegated=int(counts[DELEGATE]),
            ignored=int(counts[IGNORE]),
            lowest=None if scores is None else _lowest(scores[of_part], label[of_part]),
            bytes=len(data),
            sha256=sha256(data),
        )

    spans = bounds(columns["token_ids"].offsets.to_numpy(), tables)
    with ThreadPoolExecutor(WRITERS) as pool:
        records = list(pool.map(write, batch, tables, spans))
    write_atomic(record_path(decision, batch), RECORD_LIST.dump_json(records))


def _parquet(table: pa.Table, label: npt.NDArray[np.int8]) -> memoryview:
    schema = select(LABELS, table.schema.names)
    offsets = table["token_ids"].combine_chunks().offsets
    table = table.append_column("label", pa.ListArray.from_arrays(offsets, pa.array(label)))
    return memoryview(to_parquet(table.select(schema.names).cast(schema)))


def _lowest(scores: npt.NDArray[np.float32], label: npt.NDArray[np.int8]) -> float | None:
    """The lowest chosen score; the lowest over all parts is the threshold that users see."""
    return float(scores[label != 0].min()) if label.any() else None


def _read(decision: Decision, batch: list[str], wanted: Collection[str]) -> list[pa.Table]:
    """The signals of a batch of parts: those of the wanted columns that exist."""
    data = read_many([signals_path(decision.dataset, part) for part in batch])
    return [parse(content, wanted) for content in data]


def _signals(
    columns: Mapping[str, Any],
) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """The signals that policies read, and each token's document hash and position."""
    offsets = columns["token_ids"].offsets.to_numpy()
    lengths = np.diff(offsets)
    hashes = np.array([policies.document_hash(doc_id) for doc_id in columns["doc_id"].to_pylist()], np.uint64)
    signals = {name: columns[name].values.to_numpy(zero_copy_only=False) for name in SIGNALS if name in columns}
    position = np.arange(lengths.sum()) - np.repeat(offsets[:-1], lengths)
    return signals, np.repeat(hashes, lengths), position


def record_path(decision: Decision, batch: list[str]) -> Path:
    """The file with the records of a batch."""
    return decision.folder / RECORDS / f"{batch[0]}.json"
