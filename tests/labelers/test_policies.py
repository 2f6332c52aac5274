"""Policies against a brute-force sort, and each policy's ranking by hand."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacy.labelers.policies import (
    BINS,
    EVERYTHING,
    NOTHING,
    PASSES,
    POLICIES,
    Selection,
    Threshold,
    count,
    document_hash,
    keys,
    label,
    priorities,
    refine,
    require,
    scores,
    sortable,
    start,
    tie_hash,
)
from lacy.schemas.codes import DELEGATE, IGNORE, LEARN
from lacy.schemas.errors import PolicyError

NAN, INF = float("nan"), float("inf")
Part = dict[str, Any]


def part(doc_id: str = "a", **signals: list[float] | list[bool]) -> Part:
    """The arguments of `keys` for one document; the first value of each signal is at position 0."""
    length = len(next(iter(signals.values())))
    columns = {k: np.array(v, bool if k == "factual" else np.float32) for k, v in signals.items()}
    return {
        "signals": columns,
        "doc_hash": np.full(length, document_hash(doc_id), np.uint64),
        "position": np.arange(length, dtype=np.int32),
    }


def ranked(policy: str, tokens: Part, seed: int = 0) -> list[int]:
    """Positions of the candidates, the first to be delegated first."""
    candidates, priority = priorities(policy, **tokens, seed=seed)
    return [i for i in np.argsort(priority)[::-1].tolist() if candidates[i]]


def search(policy: str, parts: list[Part], budget: float | None, seed: int = 0, shuffle: int = 0) -> Selection:
    """The selection over parts that are counted and merged in a random order."""
    selection = start(policy, sum(len(p["position"]) for p in parts), budget)
    order = random.Random(shuffle)
    while not selection.finished:
        counts = [count(*priorities(policy, **p, seed=seed), selection) for p in parts]
        order.shuffle(counts)
        selection = refine(selection, np.sum(counts, axis=0))
    return selection


# Rankings, by hand.

LOSS = [9.0, 1.0, 3.0, 2.0, NAN, 4.0]
STUDENT = [9.0, 5.0, 1.0, 2.0, 3.0, NAN]
FACTUAL = [True, True, False, True, True, False]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("lacy", [3, 1]),
        ("loss", [5, 2, 3, 1]),
        ("none", []),
    ],
)
def test_ranking_with_a_reference_alone(policy: str, expected: list[int]) -> None:
    assert ranked(policy, part(factual=FACTUAL, ref_nll=LOSS)) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("lacy", [1, 4, 3]),  # by the student's loss: 5, 3, 2
        ("loss", [1, 4, 3, 2]),
        ("rho", [2, 3, 1]),  # student - reference: -2, 0, 4; position 4 has no reference
        ("gain", [1, 3]),  # 4, 0
    ],
)
def test_ranking_with_both_scorers(policy: str, expected: list[int]) -> None:
    assert ranked(policy, part(factual=FACTUAL, ref_nll=LOSS, student_nll=STUDENT)) == expected


def test_the_judge_ranks_what_it_marks() -> None:
    marks = [1.0, 0.0, 0.4, 1.0, NAN, 0.2]
    assert ranked("judge", part(judge=marks)) == [3, 2, 5]


def test_factual_needs_no_score_and_no_budget() -> None:
    tokens = part(factual=FACTUAL)
    assert sorted(ranked("factual", tokens)) == [1, 3, 4]
    selection = search("factual", [tokens], None)
    assert (selection.delegated, selection.threshold) == (3, EVERYTHING)
    assert label("factual", **tokens, threshold=selection.threshold).tolist() == [0, 1, 0, 1, 1, 0]


def test_random_depends_on_document_position_and_seed_alone() -> None:
    tokens = part(factual=[False] * 50)
    order = ranked("random", tokens)
    assert sorted(order) == list(range(1, 50))
    assert ranked("random", part(ref_nll=[NAN] * 50)) == order
    assert ranked("random", tokens, seed=1) != order
    assert ranked("random", part("b", factual=[False] * 50)) != order


def test_none_delegates_nothing() -> None:
    tokens = part(ref_nll=LOSS)
    selection = start("none", 6, None)
    assert selection.finished
    assert not label("none", **tokens, threshold=selection.threshold).any()


def test_scores_are_what_a_policy_ranks_by() -> None:
    signals = part(factual=FACTUAL, ref_nll=LOSS, student_nll=STUDENT)["signals"]
    assert np.array_equal(scores("rho", signals), [0, -4, 2, 0, NAN, NAN], equal_nan=True)  # type: ignore[arg-type]
    assert scores("random", signals) is None


def test_action_ignore_masks_the_same_tokens() -> None:
    tokens = part(factual=FACTUAL, ref_nll=LOSS)
    threshold = search("lacy", [tokens], 1 / 6).threshold
    delegated = label("lacy", **tokens, threshold=threshold)
    assert delegated.dtype == np.int8
    assert delegated.tolist() == [LEARN, LEARN, LEARN, DELEGATE, LEARN, LEARN]
    ignored = label("lacy", **tokens, threshold=threshold, action="ignore")
    assert ignored.tolist() == [LEARN, LEARN, LEARN, IGNORE, LEARN, LEARN]
    with pytest.raises(PolicyError, match="unknown action 'drop'"):
        label("lacy", **tokens, threshold=threshold, action="drop")


# Errors.


@pytest.mark.parametrize("policy", ["rho", "gain"])
def test_a_missing_student_is_named_with_its_flag(policy: str) -> None:
    with pytest.raises(PolicyError, match=f"'{policy}'.*student_nll.*--student"):
        keys(policy, **part(factual=FACTUAL, ref_nll=LOSS))


def test_other_errors_are_clear() -> None:
    with pytest.raises(PolicyError, match=r"ref_nll.*--reference"):
        keys("loss", **part(factual=FACTUAL))
    with pytest.raises(PolicyError, match="unknown policy 'best'; choose one of lacy"):
        keys("best", **part(factual=FACTUAL))
    with pytest.raises(PolicyError, match=r"shape \(2,\), expected \(6,\)"):
        keys("loss", **{**part(ref_nll=LOSS), "signals": {"ref_nll": np.zeros(2, np.float32)}})
    for budget in (None, -0.1, 1.1, NAN):
        with pytest.raises(PolicyError, match="--budget"):
            start("lacy", 10, budget)


def test_require_checks_a_run_before_it_starts() -> None:
    for policy in POLICIES:
        require(policy, reference=True, student=True, judge=True)
    require("lacy", "ignore", reference=False, student=True)
    with pytest.raises(PolicyError, match=r"student_nll.*--student"):
        require("gain", reference=True, student=False)
    with pytest.raises(PolicyError, match=r"ref_nll.*--reference"):
        require("lacy", reference=False, student=False)
    with pytest.raises(PolicyError, match=r"judge.*--judge"):
        require("judge", reference=True, student=True)
    with pytest.raises(PolicyError, match="unknown action"):
        require("lacy", "drop", reference=True, student=False)


# Integers that keep an order.


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=50))
def test_sortable_keeps_the_order_of_floats(scores: list[float]) -> None:
    key = sortable(scores).astype(np.int64)
    array = np.array(scores, np.float32)
    assert ((key[:, None] < key) == (array[:, None] < array)).all()
    assert ((key[:, None] == key) == (array[:, None] == array)).all()


def test_sortable_at_the_edges() -> None:
    key = sortable([-INF, -3.4e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3.4e38, INF])
    assert key.dtype == np.uint32
    assert key[4] == key[5]
    assert (np.diff(np.delete(key, 4).astype(np.int64)) > 0).all()


def test_hashes_never_change() -> None:
    assert document_hash("a") == 3405396810240292928
    assert tie_hash(document_hash("a"), [0, 1, 2]).tolist() == tie_hash([document_hash("a")] * 3, [0, 1, 2]).tolist()
    assert tie_hash(document_hash("a"), [0, 1, 2]).tolist() == [2953970405, 892726225, 3763284275]
    assert tie_hash(2**64 - 1, [2**31 - 1], seed=-1).dtype == np.uint32


def test_tie_hashes_are_spread_evenly() -> None:
    ties = tie_hash(document_hash("x"), np.arange(1 << 16))
    assert len(np.unique(ties)) > (1 << 16) - 10
    assert np.bincount(ties >> 28, minlength=16).std() < 200


# The exact selection, against a sort.


def brute_force(policy: str, parts: list[Part], wanted: int) -> list[list[int]]:
    """The delegated positions of each part: sorted by (key, -tie hash), the highest first."""
    ranks = []
    for number, tokens in enumerate(parts):
        candidates, key = keys(policy, **tokens)
        tie = tie_hash(tokens["doc_hash"], tokens["position"])
        ranks += [(-int(key[i]), int(tie[i]), number, i) for i in np.flatnonzero(candidates).tolist()]
    chosen: list[list[int]] = [[] for _ in parts]
    for _, _, number, i in sorted(ranks)[:wanted]:
        chosen[number].append(i)
    return [sorted(c) for c in chosen]


SCORES = st.one_of(
    st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 1.0, -1.0, 2.5]),  # heavy ties
    st.floats(width=32),
)


@st.composite
def corpora(draw: st.DrawFn) -> list[Part]:
    parts = []
    for number in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 30))
        columns = {
            name: draw(st.lists(SCORES, min_size=size, max_size=size)) for name in ("ref_nll", "student_nll", "judge")
        }
        factual = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        parts.append(part(f"doc {number}", **columns, factual=factual))
    return parts


@settings(max_examples=150, deadline=None)
@given(
    parts=corpora(),
    policy=st.sampled_from(sorted(set(POLICIES) - {"none", "factual"})),
    budget=st.floats(0, 1),
    shuffle=st.integers(0, 99),
)
def test_the_selection_equals_a_sort(parts: list[Part], policy: str, budget: float, shuffle: int) -> None:
    selection = search(policy, parts, budget, shuffle=shuffle)
    wanted = round(budget * sum(len(p["position"]) for p in parts))
    expected = brute_force(policy, parts, wanted)
    labels = [label(policy, **p, threshold=selection.threshold) for p in parts]
    assert [np.flatnonzero(x == DELEGATE).tolist() for x in labels] == expected
    assert all(x[0] == LEARN for x in labels)
    assert selection.delegated == sum(map(len, expected))
    assert selection.short == (selection.delegated < wanted)


def test_ties_alone_are_divided_exactly() -> None:
    parts = [part(f"doc {i}", ref_nll=[1.0] * 1000) for i in range(20)]
    selection = search("loss", parts, 0.15)
    labels = [label("loss", **p, threshold=selection.threshold) for p in parts]
    assert sum(int((x == DELEGATE).sum()) for x in labels) == selection.delegated == 3000
    assert all(90 < (x == DELEGATE).sum() < 210 for x in labels), "no document is preferred"


def test_the_share_is_met_on_a_million_tokens() -> None:
    scores = np.random.default_rng(0).exponential(2.0, 1_000_000).astype(np.float32).round(2)
    tokens = part(ref_nll=[0.0])
    tokens = {
        "signals": {"ref_nll": scores},
        "doc_hash": tokens["doc_hash"],
        "position": np.arange(len(scores), dtype=np.int32),
    }
    selection = search("loss", [tokens], 0.15)
    assert (label("loss", **tokens, threshold=selection.threshold) == DELEGATE).sum() == 150_000
    assert len(selection.prefix) <= PASSES


def test_a_search_may_stop_after_any_pass() -> None:
    tokens = part(ref_nll=np.linspace(1, 2, 10_000).tolist())
    selection = start("loss", 10_000, 0.15)
    distances = []
    while not selection.finished:
        selection = refine(selection, count(*priorities("loss", **tokens), selection))
        delegated = int((label("loss", **tokens, threshold=selection.threshold) == DELEGATE).sum())
        assert delegated == selection.delegated
        distances.append(abs(delegated - 1500))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0


def test_fewer_candidates_than_the_budget_are_all_delegated() -> None:
    tokens = part(factual=[True, True, False, True], ref_nll=[1.0, 2.0, 3.0, NAN])
    selection = search("lacy", [tokens], 0.9)
    assert (selection.short, selection.delegated, selection.threshold) == (True, 1, EVERYTHING)


def test_a_budget_of_nothing_and_no_candidates() -> None:
    tokens = part(factual=[True, False], ref_nll=[1.0, 2.0])
    assert search("lacy", [tokens], 0.0).threshold == NOTHING
    assert search("lacy", [tokens], 1.0).delegated == 0


def test_counts_are_histograms_of_one_digit() -> None:
    tokens = part(ref_nll=LOSS)
    counts = count(*priorities("loss", **tokens), start("loss", 6, 0.5))
    assert (counts.shape, counts.dtype, int(counts.sum())) == ((BINS,), np.dtype(np.int64), 4)


def test_thresholds_at_the_edges() -> None:
    priority = np.array([0, 1 << 32, (1 << 64) - 1], np.uint64)
    assert EVERYTHING.includes(priority).all()
    assert not NOTHING.includes(priority).any()
    assert Threshold(key=0, tie=0).includes(priority).tolist() == [False, True, True]
