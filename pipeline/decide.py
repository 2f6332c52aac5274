"""`lacy decide`: from the signals on disk to labels, by a policy and a budget, without any model.

A budget is a share of the whole corpus, so its threshold is a quantile over all parts. `labelers.policies` finds it
exactly, by radix selection: each pass counts one more digit of the tokens' priorities, and counts of parts add up in
any order. In Beam, a pass is a count over parts, a merge, and a side input for the next.

    parts -> count -> merge -> refine -> count -> merge -> refine -> ... -> threshold -> write labels
"""

import re
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
from lacy.pipeline.batches import batches, bounds, join, parse
from lacy.pipeline.runners import local, submit
from lacy.pipeline.runners.heartbeat import Counts as Progress
from lacy.pipeline.runners.heartbeat import Heartbeat
from lacy.pipeline.runners.packed import listed
from lacy.schemas.card import write_card
from lacy.schemas.codes import DELEGATE, IGNORE
from lacy.schemas.errors import DatasetError
from lacy.schemas.files import read_many, remove, remove_temporary, remove_tree, sha256, sizes, write_atomic
from lacy.schemas.manifest import (
    LABEL_SET_NAME,
    OLD_POLICY,
    POLICY,
    RECORDS,
    LabelRecord,
    LabelSet,
    Manifest,
    at,
    labels_path,
    policy_path,
    read_complete,
    read_label_set,
    save,
    signals_path,
)
from lacy.schemas.parts import LABELS, select, to_parquet

WRITERS = 16  # threads that encode and write the parts of a batch
Counts = npt.NDArray[np.int64]
_RECORDS = TypeAdapter(list[LabelRecord])
_SIGNALS = ("factual", "ref_nll", "student_nll", "judge")  # what policies may ask for


@dataclass(frozen=True)
class Decision:
    """What the workers need to know."""

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


def decide(
    dataset: Path,
    policy: str,
    *,
    budget: float = 0.15,
    action: str = "delegate",
    name: str | None = None,
    seed: int = 0,
    workers: int = 1,
    beam_options: list[str] | None = None,
) -> LabelSet:
    """Write the label set `name` (default: the policy's) and return its record.

    The threshold is exact: round(budget * tokens) tokens are chosen, or all that the policy allows when these are
    fewer. Equal scores are told apart by a hash of document id and position. A label set that has the name already is
    replaced. With `beam_options` that name another runner the work is done there.

    Raises DatasetError for a dataset that is missing or unfinished, PolicyError, RunError.
    """
    manifest = read_complete(dataset)
    have = {role: role in manifest.models for role in ("reference", "student", "judge")}
    policies.require(policy, action, **have)
    name = name or policy
    if not re.fullmatch(LABEL_SET_NAME, name):
        raise policies.PolicyError(f"{name!r} cannot name a label set: use letters, digits, '.', '_' and '-'")
    budgeted = policies.POLICIES[policy].budgeted
    elsewhere = submit.elsewhere(beam_options)
    place = at(submit.absolute(str(dataset))) if elsewhere else dataset
    decision = Decision(place, name, policy, budget if budgeted else None, action, seed, manifest.tokens)
    planned = [[record.name for record in batch] for batch in batches([r for r in manifest.parts if r.rows])]
    # Readers know a label set by its _policy.json: it is removed first and written last.
    for record in (POLICY, OLD_POLICY):
        remove(decision.folder / record)
    remove_tree(decision.folder / RECORDS)
    remove_temporary(decision.folder)

    def graph(pipeline: beam.Pipeline, _: Heartbeat) -> None:
        build(pipeline, decision, planned)

    def progress() -> Progress:
        written = sizes(decision.folder / RECORDS)
        return Progress(parts=sum(len(batch) for batch in planned if f"{batch[0]}.json" in written))

    if elsewhere:
        submit.run(graph, beam_options=beam_options or [], count=progress)
    else:
        local.run(graph, workers=workers)
    try:
        written = read_many([_record_path(decision, batch) for batch in planned])
    except FileNotFoundError:  # the other one took them away
        raise DatasetError(f"another run decides {decision.folder} at the same time: run this one again") from None
    records = [record for data in written for record in _RECORDS.validate_json(data)]
    for stray in sizes(decision.folder, "*.parquet").keys() - {f"{record.name}.parquet" for record in records}:
        remove(decision.folder / stray)
    remove_tree(decision.folder / RECORDS)
    chosen = sum(record.delegated + record.ignored for record in records)
    labels = LabelSet(
        name=name,
        policy=policy,
        action=action,  # type: ignore[arg-type]
        budget=decision.budget,
        seed=seed,
        tokens=manifest.tokens,
        candidates=sum(record.candidates for record in records),
        chosen=chosen,
        share=chosen / manifest.tokens if manifest.tokens else 0.0,
        threshold=min((record.lowest for record in records if record.lowest is not None), default=None),
        parts=records,
    )
    save(policy_path(dataset, name), labels)
    write_card(dataset, manifest)
    return labels


def decided(
    dataset: Path, policy: str, *, budget: float = 0.15, action: str = "delegate", seed: int = 0
) -> LabelSet | None:
    """The label set that `decide` would write, where it is there already: decided so, for the same parts, none lost."""
    folder = dataset / "labels" / policy
    measured = _extent(read_complete(dataset))
    try:
        found = read_label_set(dataset, policy)
    except (FileNotFoundError, DatasetError):
        return None
    asked = (policy, budget if policies.POLICIES[policy].budgeted else None, action, seed)
    if asked != (found.policy, found.budget, found.action, found.seed) or _extent(found) != measured:
        return None
    written = sizes(folder, "*.parquet")
    return found if all(written.get(f"{record.name}.parquet") == record.bytes for record in found.parts) else None


def _extent(parts: Manifest | LabelSet) -> list[tuple[str, int, int]]:
    return [(record.name, record.rows, record.tokens) for record in parts.parts if record.rows]


def build(pipeline: beam.Pipeline, decision: Decision, planned: list[list[str]]) -> None:
    """Add the graph to a pipeline; the elements are batches of parts."""
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
    """Histograms of parts add up, in any order, to that of the corpus."""

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
    columns = join(_read(decision, batch, ("doc_id", "token_ids", *_SIGNALS)))
    return policies.count(*policies.priorities(decision.policy, *_signals(columns), seed=decision.seed), selection)


def _refine(selection: Selection, counts: Counts) -> Selection:
    return selection if selection.finished else policies.refine(selection, counts)


def _write(batch: list[str], selection: Selection, decision: Decision) -> None:
    """Write some parts of the label set, then their records."""
    tables = _read(decision, batch, LABELS.names)
    columns = join(tables)
    signals = _signals(columns)
    threshold = selection.threshold if policies.POLICIES[decision.policy].budgeted else policies.EVERYTHING
    label = policies.label(decision.policy, *signals, threshold, decision.action, seed=decision.seed)
    candidates, _ = policies.keys(decision.policy, *signals, seed=decision.seed)
    scores = policies.scores(decision.policy, signals[0])

    def write(part: str, table: pa.Table, place: tuple[int, int]) -> LabelRecord:
        of_part = slice(*place)
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

    places = bounds(columns["token_ids"].offsets.to_numpy(), tables)
    with ThreadPoolExecutor(WRITERS) as pool:
        records = list(pool.map(write, batch, tables, places))
    write_atomic(_record_path(decision, batch), _RECORDS.dump_json(records))


def _parquet(table: pa.Table, label: npt.NDArray[np.int8]) -> memoryview:
    schema = select(LABELS, table.schema.names)
    offsets = table["token_ids"].combine_chunks().offsets
    table = table.append_column("label", pa.ListArray.from_arrays(offsets, pa.array(label)))
    return memoryview(to_parquet(table.select(schema.names).cast(schema)))


def _lowest(scores: npt.NDArray[np.float32], label: npt.NDArray[np.int8]) -> float | None:
    """The lowest score that was chosen: over all parts, the threshold as a user reads it."""
    return float(scores[label != 0].min()) if label.any() else None


def _read(decision: Decision, batch: list[str], wanted: Collection[str]) -> list[pa.Table]:
    """The signals of some parts: the columns that there are of those wanted."""
    data = read_many([signals_path(decision.dataset, part) for part in batch])
    return [parse(content, wanted) for content in data]


def _signals(
    columns: Mapping[str, Any],
) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """What policies ask for, and for each token its document's hash and its position."""
    offsets = columns["token_ids"].offsets.to_numpy()
    lengths = np.diff(offsets)
    hashes = np.array([policies.document_hash(doc_id) for doc_id in columns["doc_id"].to_pylist()], np.uint64)
    signals = {name: columns[name].values.to_numpy(zero_copy_only=False) for name in _SIGNALS if name in columns}
    position = np.arange(lengths.sum()) - np.repeat(offsets[:-1], lengths)
    return signals, np.repeat(hashes, lengths), position


def _record_path(decision: Decision, batch: list[str]) -> Path:
    """Of the records of a batch."""
    return decision.folder / RECORDS / f"{batch[0]}.json"
