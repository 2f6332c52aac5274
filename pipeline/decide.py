"""`lacy decide`: from the signals on disk to labels, by a policy and a budget, without any model.

A budget is a share of the whole corpus, so its threshold is a quantile over all parts. `labelers.policies` finds it
exactly, by radix selection: each pass counts one more digit of the tokens' priorities, and counts of parts add up in
any order. In Beam, a pass is a count over parts, a merge, and a side input for the next.

    parts -> count -> merge -> refine -> count -> merge -> refine -> ... -> threshold -> write labels
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from labelers import policies
from labelers.policies import Selection
from pipeline import local
from schemas.codes import DELEGATE, IGNORE
from schemas.files import sha256, write_atomic
from schemas.manifest import LabelRecord, LabelSet, labels_path, load, read_complete, save, signals_path
from schemas.parts import LABELS, select, to_parquet

RECORDS = ".parts"
Counts = npt.NDArray[np.int64]


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
) -> LabelSet:
    """Write the label set `name` (default: the policy's) and return its record.

    The threshold is exact: round(budget * tokens) tokens are chosen, or all that the policy allows when these are
    fewer. Equal scores are told apart by a hash of document id and position. A label set that has the name already is
    replaced.

    Raises DatasetError for a dataset that is missing or unfinished, PolicyError, RunError.
    """
    manifest = read_complete(dataset)
    have = {role: role in manifest.models for role in ("reference", "student", "judge")}
    policies.require(policy, action, **have)
    name = name or policy
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise policies.PolicyError(f"{name!r} cannot name a label set: use letters, digits, '.', '_' and '-'")
    budgeted = policies.POLICIES[policy].budgeted
    decision = Decision(dataset, name, policy, budget if budgeted else None, action, seed, manifest.tokens)
    parts = [record.name for record in manifest.parts if record.rows]
    shutil.rmtree(decision.folder, ignore_errors=True)
    local.run(lambda pipeline, _: build(pipeline, decision, parts), workers=workers)
    records = [load(_record_path(decision, part), LabelRecord) for part in parts]
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
    save(decision.folder / "policy.json", labels)
    shutil.rmtree(decision.folder / RECORDS)
    return labels


def build(pipeline: beam.Pipeline, decision: Decision, parts: list[str]) -> None:
    """Add the graph to a pipeline."""
    names = pipeline | "parts" >> beam.Create(parts)
    start = policies.start(decision.policy, decision.tokens, decision.budget)
    selection = pipeline | "start" >> beam.Create([start])
    passes = policies.PASSES if policies.POLICIES[decision.policy].budgeted else 0
    for number in range(1, passes + 1):
        counts = (
            names
            | f"spread {number}" >> beam.Reshuffle()
            | f"count {number}" >> beam.Map(_count, beam.pvalue.AsSingleton(selection), decision)
            | f"merge {number}" >> beam.CombineGlobally(_Sum())
        )
        selection = selection | f"refine {number}" >> beam.Map(_refine, beam.pvalue.AsSingleton(counts))
    _ = names | "spread" >> beam.Reshuffle() | "write" >> beam.Map(_write, beam.pvalue.AsSingleton(selection), decision)


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


def _count(part: str, selection: Selection, decision: Decision) -> Counts:
    if selection.finished:
        return np.zeros(policies.BINS, np.int64)
    signals = _read(decision.dataset, decision.policy, part)
    return policies.count(*policies.priorities(decision.policy, *signals, seed=decision.seed), selection)


def _refine(selection: Selection, counts: Counts) -> Selection:
    return selection if selection.finished else policies.refine(selection, counts)


def _write(part: str, selection: Selection, decision: Decision) -> None:
    """Write one part of the label set, then its record."""
    signals = _read(decision.dataset, decision.policy, part)
    threshold = selection.threshold if policies.POLICIES[decision.policy].budgeted else policies.EVERYTHING
    label = policies.label(decision.policy, *signals, threshold, decision.action, seed=decision.seed)
    candidates, _ = policies.keys(decision.policy, *signals, seed=decision.seed)
    present = pq.read_schema(signals_path(decision.dataset, part)).names
    schema = select(LABELS, present)
    table = pq.read_table(
        signals_path(decision.dataset, part), columns=[name for name in schema.names if name != "label"]
    )
    offsets = table["token_ids"].combine_chunks().offsets
    table = table.append_column("label", pa.ListArray.from_arrays(offsets, pa.array(label)))
    data = memoryview(to_parquet(table.select(schema.names).cast(schema)))
    write_atomic(labels_path(decision.dataset, decision.name, part), data)
    counts = np.bincount(label, minlength=3)
    record = LabelRecord(
        name=part,
        rows=table.num_rows,
        tokens=len(label),
        candidates=int(candidates.sum()),
        delegated=int(counts[DELEGATE]),
        ignored=int(counts[IGNORE]),
        lowest=_lowest(decision.policy, signals[0], label),
        bytes=len(data),
        sha256=sha256(data),
    )
    save(_record_path(decision, part), record)


def _lowest(policy: str, signals: dict[str, Any], label: npt.NDArray[np.int8]) -> float | None:
    """The lowest score that was chosen: over all parts, the threshold as a user reads it."""
    score = policies.scores(policy, signals)
    return None if score is None or not label.any() else float(score[label != 0].min())


def _read(
    dataset: Path, policy: str, part: str
) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """The signals that a policy needs, and for each token its document's hash and its position."""
    path = signals_path(dataset, part)
    wanted = {"factual", "ref_nll", "student_nll", "judge"} & set(pq.read_schema(path).names)
    table = pq.read_table(path, columns=["doc_id", "token_ids", *sorted(wanted)])
    offsets = table["token_ids"].combine_chunks().offsets.to_numpy()
    lengths = np.diff(offsets)
    hashes = np.array([policies.document_hash(doc_id) for doc_id in table["doc_id"].to_pylist()], np.uint64)
    signals = {name: table[name].combine_chunks().values.to_numpy(zero_copy_only=False) for name in sorted(wanted)}
    position = np.arange(lengths.sum()) - np.repeat(offsets[:-1], lengths)
    return signals, np.repeat(hashes, lengths), position


def _record_path(decision: Decision, part: str) -> Path:
    return decision.folder / RECORDS / f"{part}.json"
