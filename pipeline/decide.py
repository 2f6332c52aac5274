"""`lacy decide`: from the signals on disk to labels, by a policy and a budget, without any model.

A budget is a share of the whole corpus, so its threshold is a quantile over all parts. `labelers.policies` finds it
exactly, by radix selection: each pass counts one more digit of the tokens' priorities, and counts of parts add up in
any order. In Beam (`pipeline.decide_graph`), a pass is a count over parts, a merge, and a side input for the next.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lacy.labelers import policies
from lacy.pipeline.batches import batches
from lacy.pipeline.options import DEFAULT_BUDGET, ROLES, LabelOptions
from lacy.pipeline.runners.counts import Counts
from lacy.schemas.card import write_card
from lacy.schemas.errors import DatasetError, PolicyError
from lacy.schemas.files import read_many, remove, remove_temporary, remove_tree, sizes
from lacy.schemas.manifest import (
    LABEL_SET_NAME,
    OLD_POLICY,
    POLICY,
    RECORDS,
    LabelSet,
    Manifest,
    at,
    policy_path,
    read_complete,
    read_label_set,
    save,
)

if TYPE_CHECKING:  # Beam takes seconds to import: `decided` and `budget_of` do without
    from lacy.pipeline.runners.heartbeat import Heartbeat


def decide(
    dataset: Path,
    policy: str,
    *,
    budget: float | None = None,
    action: str = "delegate",
    name: str | None = None,
    seed: int = 0,
    workers: int = 1,
    beam_options: list[str] | None = None,
) -> LabelSet:
    """Write the label set `name` (default: the policy's) and return its record.

    budget: share of all tokens, default DEFAULT_BUDGET; the threshold is exact, so round(budget * tokens) tokens are
        chosen, or all that the policy allows when these are fewer; a hash of document id and position breaks ties
    beam_options: where they name another runner, the work is done there

    An existing label set of that name is replaced.

    Raises DatasetError for a dataset that is missing or unfinished, PolicyError, RunError.
    """
    manifest = read_complete(dataset)
    have = {role: role in manifest.models for role in ("reference", "student", "judge")}
    policies.require(policy, action, **have)
    budget = budget_of(policy, budget)
    name = name or policy
    if not re.fullmatch(LABEL_SET_NAME, name):
        raise PolicyError(f"{name!r} cannot name a label set: use letters, digits, '.', '_' and '-'")
    from lacy.pipeline.decide_graph import RECORD_LIST, Decision, build, record_path
    from lacy.pipeline.runners import local, submit

    elsewhere = submit.elsewhere(beam_options)
    location = at(submit.absolute(str(dataset))) if elsewhere else dataset
    decision = Decision(location, name, policy, budget, action, seed, manifest.tokens)
    planned = [[record.name for record in batch] for batch in batches([r for r in manifest.parts if r.rows])]
    # Readers know a label set by its _policy.json: it is removed first and written last.
    for record in (POLICY, OLD_POLICY):
        remove(decision.folder / record)
    remove_tree(decision.folder / RECORDS)
    remove_temporary(decision.folder)

    def graph(pipeline: Any, _: "Heartbeat") -> None:
        build(pipeline, decision, planned)

    def count() -> Counts:
        written = sizes(decision.folder / RECORDS)
        return Counts(parts=sum(len(batch) for batch in planned if f"{batch[0]}.json" in written))

    if elsewhere:
        submit.run(graph, beam_options=beam_options or [], count=count)
    else:
        local.run(graph, workers=workers)
    try:
        written = read_many([record_path(decision, batch) for batch in planned])
    except FileNotFoundError:  # the other run removed them
        raise DatasetError(f"another run is deciding {decision.folder}: rerun this command when it has ended") from None
    records = [record for data in written for record in RECORD_LIST.validate_json(data)]
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
    write_card(dataset, manifest, labels)  # first: a run that is killed here decides again
    save(policy_path(dataset, name), labels)
    return labels


def decided(
    dataset: Path, policy: str, *, budget: float | None = None, action: str = "delegate", seed: int = 0
) -> LabelSet | None:
    """The label set that `decide` would write, if it exists already for the same parts, with all of its files."""
    folder = dataset / "labels" / policy
    measured = _extent(read_complete(dataset))
    try:
        found = read_label_set(dataset, policy)
    except (FileNotFoundError, DatasetError):
        return None
    asked = (policy, budget_of(policy, budget), action, seed)
    if asked != (found.policy, found.budget, found.action, found.seed) or _extent(found) != measured:
        return None
    written = sizes(folder, "*.parquet")
    return found if all(written.get(f"{record.name}.parquet") == record.bytes for record in found.parts) else None


def _extent(parts: Manifest | LabelSet) -> list[tuple[str, int, int]]:
    return [(record.name, record.rows, record.tokens) for record in parts.parts if record.rows]


def budget_of(policy: str, budget: float | None) -> float | None:
    """The budget of a decision, None for a policy without one. Raises PolicyError for a budget that has no effect."""
    if policies.POLICIES[policy].budgeted:
        return DEFAULT_BUDGET if budget is None else budget
    if budget is not None:
        raise PolicyError(f"policy {policy} has no budget: leave out --budget, or use --policy lacy")
    return None


def require_policy(options: LabelOptions, policy: str, action: str = "delegate", budget: float | None = None) -> None:
    """Raises PolicyError, before any work, for a policy that the models of a run cannot serve, or an unused budget."""
    have = {role: getattr(options, role) is not None for role in ROLES}
    if options.reference is None and policy in policies.POLICIES and "loss" in policies.POLICIES[policy].needs:
        raise PolicyError(
            f"--reference none measures no loss, which policy {policy} needs: add --policy factual, or a --reference"
        )
    policies.require(policy, action, **have)
    budget_of(policy, budget)
