"""Policies: from a token's signals to its label, exactly within a budget over a whole corpus.

A policy names the tokens that may be delegated (its candidates) and scores them. Each candidate gets a priority, one
64-bit number that no two tokens of a corpus are likely to share:

    priority = key << 32 | (2**32 - 1 - tie hash)        # a higher priority is delegated first

where the key is the score as an order-preserving 32-bit integer, and the tie hash, which depends only on the
document's id and the position, orders equal scores. A radix selection over that number meets the budget, 16 bits per
pass: each part of the corpus is counted into BINS bins, the counts of all parts are added, in any order, and `refine`
chooses the bin that holds the threshold. Two passes settle the key; the third and fourth separate tokens with equal
keys, and after the fourth the number of delegated tokens is exact.

    selection = start(policy, total_tokens, budget=0.15)
    while not selection.finished:
        counts = sum(count(*priorities(policy, ..., seed=seed), selection) for each part)
        selection = refine(selection, counts)
    labels = label(policy, ..., selection.threshold, seed=seed)    # for each part
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from lacy.schemas.codes import DELEGATE, IGNORE, LEARN
from lacy.schemas.errors import PolicyError
from lacy.schemas.hashing import shift, signed, splitmix64

Signals = Mapping[str, npt.NDArray[Any]]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating[Any]]
UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
_MASK = (1 << 64) - 1
PASSES = 64 // DIGIT_BITS

ACTIONS = {"delegate": DELEGATE, "ignore": IGNORE}
_FLAGS = {
    "factual": "the grammar tagger writes it",
    "ref_nll": "label the corpus with --reference MODEL",
    "student_nll": "label the corpus with --student MODEL",
    "judge": "label the corpus with --judge MODEL",
}


@dataclass(frozen=True)
class Policy:
    """A row of POLICIES. `score` maps the needed columns to (N,) floats, the highest delegated first."""

    name: str
    doc: str
    needs: tuple[str, ...] = ()  # columns; "loss" stands for student_nll where present, else ref_nll
    score: Callable[[Signals], FloatArray] | None = None
    factual_only: bool = False
    positive_only: bool = False  # a score of 0 counts as none
    random: bool = False  # the key is a seeded hash
    delegates: bool = True
    budgeted: bool = True  # False: every candidate, whatever the budget


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            "lacy", "factual tokens, highest loss first", ("factual", "loss"), lambda s: s["loss"], factual_only=True
        ),
        Policy("loss", "any tokens, highest loss first", ("loss",), lambda s: s["loss"]),
        Policy(
            "rho",
            "tokens with the lowest excess loss (student_nll - ref_nll) first",
            ("student_nll", "ref_nll"),
            lambda s: s["ref_nll"] - s["student_nll"],
        ),
        Policy(
            "gain",
            "factual tokens where the partner helps most (student_nll - ref_nll) first",
            ("factual", "student_nll", "ref_nll"),
            lambda s: s["student_nll"] - s["ref_nll"],
            factual_only=True,
        ),
        Policy(
            "judge",
            "tokens that the LLM judge marks, highest score first",
            ("judge",),
            lambda s: s["judge"],
            positive_only=True,
        ),
        Policy("factual", "all factual tokens, no budget", ("factual",), factual_only=True, budgeted=False),
        Policy("random", "a seeded hash of document id and position", random=True),
        Policy("none", "nothing", delegates=False, budgeted=False),
    )
}


def require(policy: str, action: str = "delegate", *, reference: bool, student: bool, judge: bool = False) -> None:
    """Check a policy and action before any work is done.

    Raises PolicyError for an unknown one, and for one that needs a model (reference, student, judge) the run lacks.
    """
    row = _policy(policy)
    _label_code(action)
    have = {"factual": True, "ref_nll": reference, "student_nll": student, "judge": judge}
    for need in row.needs:
        if not have[_column(need, student)]:
            raise PolicyError(_missing(row, _column(need, student)))


def scores(policy: str, signals: Signals) -> npt.NDArray[np.float32] | None:
    """The score that a policy ranks tokens by: (N,) float32, NaN where missing; None for a policy without a score.

    The highest is delegated first. Raises PolicyError as `keys` does.
    """
    row = _policy(policy)
    if row.score is None:
        return None
    columns = _columns(row, signals)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(row.score(columns)).astype(np.float32)


def keys(
    policy: str, signals: Signals, doc_hash: npt.ArrayLike, position: npt.ArrayLike, *, seed: int = 0
) -> tuple[BoolArray, UInt32Array]:
    """Which tokens may be delegated, and in which order.

    signals   columns by name, (N,) each; floats may be NaN for a missing score
    doc_hash  `document_hash` of each token's document, (N,) or a scalar
    position  index of the token in its document, (N,)
    seed      of the policy `random`

    Returns candidates, (N,) bool, never true at position 0 or where the policy's score is NaN; and keys, (N,) uint32,
    the highest delegated first, 0 for tokens that are not candidates.

    Raises PolicyError for an unknown policy, a missing column (the message names the flag that adds it), or a column of
    another length.
    """
    row = _policy(policy)
    position = np.asarray(position)
    columns = _columns(row, signals, len(position))
    score = scores(policy, signals)
    candidates = (position != 0) & row.delegates
    if row.factual_only:
        candidates &= columns["factual"].astype(bool)
    key = np.zeros(len(position), np.uint32)
    if score is not None:
        candidates &= score > 0 if row.positive_only else ~np.isnan(score)
        key = sortable(score)
    elif row.random:
        key = tie_hash(doc_hash, position, seed=seed ^ _RANDOM_STREAM)
    return candidates, np.where(candidates, key, np.uint32(0))


def priorities(
    policy: str, signals: Signals, doc_hash: npt.ArrayLike, position: npt.ArrayLike, *, seed: int = 0
) -> tuple[BoolArray, UInt64Array]:
    """As `keys`, with ties broken: candidates, (N,) bool, and priorities, (N,) uint64, higher first."""
    candidates, key = keys(policy, signals, doc_hash, position, seed=seed)
    tie = tie_hash(doc_hash, position, seed=seed)
    return candidates, key.astype(np.uint64) << np.uint64(32) | (~tie).astype(np.uint64)


def label(
    policy: str,
    signals: Signals,
    doc_hash: npt.ArrayLike,
    position: npt.ArrayLike,
    threshold: "Threshold",
    action: str = "delegate",
    *,
    seed: int = 0,
) -> npt.NDArray[np.int8]:
    """(N,) int8 codes: DELEGATE for candidates at or above the threshold (IGNORE for the action "ignore"), else LEARN.

    The seed must be that of the search for the threshold.
    """
    code = _label_code(action)
    candidates, priority = priorities(policy, signals, doc_hash, position, seed=seed)
    chosen = candidates & threshold.includes(priority)
    return np.where(chosen, np.int8(code), np.int8(LEARN))


# Scores and hashes as integers.

_RANDOM_STREAM = 0x52414E444F4D  # keeps the keys of `random` apart from its tie hashes


def sortable(score: npt.ArrayLike) -> UInt32Array:
    """float32 scores as uint32 in the same order, -inf lowest; -0.0 equals 0.0. The order of NaN is undefined."""
    bits = (np.asarray(score, np.float32) + np.float32(0)).view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    return np.where(negative, ~bits, bits | np.uint32(1 << 31))


def tie_hash(doc_hash: npt.ArrayLike, position: npt.ArrayLike, seed: int = 0) -> UInt32Array:
    """A pseudo-random uint32 for each (document, position, seed), the same on every platform and in every version.

    The upper half of splitmix64's mixing function, applied twice: to the document's hash plus the mixed seed, and to
    that plus the position. All arithmetic is modulo 2**64; the arguments broadcast.
    """
    mixed_seed = splitmix64(np.array([signed(seed)]))
    document = splitmix64(np.asarray(doc_hash, np.uint64).view(np.int64) + mixed_seed)
    return shift(splitmix64(document + np.asarray(position).astype(np.int64)), 32).astype(np.uint32)


def document_hash(doc_id: str) -> int:
    """The document's id as a number below 2**64: BLAKE2b of its UTF-8, 8 bytes, little endian."""
    return int.from_bytes(blake2b(doc_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# The threshold and the search for it.


@dataclass(frozen=True)
class Threshold:
    """A candidate is delegated if its key is above `key`, or equal to it with a tie hash below `tie`."""

    key: int  # 0 to 2**32 - 1
    tie: int  # 0 to 2**32

    def includes(self, priority: UInt64Array) -> BoolArray:
        floor = (self.key << 32) + (1 << 32) - self.tie
        return np.zeros(priority.shape, bool) if floor > _MASK else priority >= np.uint64(floor)


NOTHING = Threshold(key=(1 << 32) - 1, tie=0)
EVERYTHING = Threshold(key=0, tie=1 << 32)


@dataclass(frozen=True)
class Selection:
    """The state of the search for the `wanted` highest priorities; `start` makes it, `refine` advances it."""

    wanted: int
    prefix: tuple[int, ...] = ()  # the known digits of the threshold, highest first
    above: int = 0  # candidates above all priorities with this prefix
    inside: int | None = None  # candidates with this prefix; None until the first pass

    @property
    def finished(self) -> bool:
        """Whether further passes would not bring the number of delegated tokens closer to `wanted`."""
        if self.wanted == 0:
            return True
        return self.inside is not None and (self.above + self.inside <= self.wanted or len(self.prefix) == PASSES)

    @property
    def delegated(self) -> int:
        """How many candidates `threshold` delegates."""
        return self.above + (self.inside or 0) * self._takes_inside

    @property
    def short(self) -> bool:
        """Whether there are fewer candidates than wanted, so that all are delegated."""
        return self.inside is not None and not self.prefix and self.inside < self.wanted

    @property
    def threshold(self) -> Threshold:
        """The best threshold after the passes so far; exact when `finished`."""
        if not self.prefix:
            return EVERYTHING if self._takes_inside else NOTHING
        lowest = 0
        for digit in self.prefix:
            lowest = lowest << DIGIT_BITS | digit
        unknown_bits = 64 - DIGIT_BITS * len(self.prefix)
        floor = lowest + (not self._takes_inside) << unknown_bits
        if floor > _MASK:
            return NOTHING
        return Threshold(key=floor >> 32, tie=(1 << 32) - (floor & 0xFFFFFFFF))

    @property
    def _takes_inside(self) -> bool:
        return self.inside is not None and 0 < self.inside <= 2 * (self.wanted - self.above)


def start(policy: str, total_tokens: int, budget: float | None) -> Selection:
    """A search for budget x total_tokens candidates, rounded to the nearest (half to even).

    `total_tokens` counts all tokens of the corpus, candidates or not. A policy without a budget ignores it. Raises
    PolicyError for a missing budget, or one outside 0 to 1.
    """
    row = _policy(policy)
    if not row.budgeted:
        return Selection(total_tokens if row.delegates else 0)
    if budget is None or not 0 <= budget <= 1:
        raise PolicyError(f"policy {policy!r} needs a --budget from 0 to 1, not {budget}")
    return Selection(round(budget * total_tokens))


def count(candidates: BoolArray, priority: UInt64Array, selection: Selection) -> npt.NDArray[np.int64]:
    """(BINS,) int64: a part's candidates with the known prefix, counted by the next digit of their priority."""
    inside = priority[candidates]
    digits = len(selection.prefix)
    if digits:
        prefix = 0
        for digit in selection.prefix:
            prefix = prefix << DIGIT_BITS | digit
        inside = inside[inside >> np.uint64(64 - DIGIT_BITS * digits) == prefix]
    digit_of = (inside >> np.uint64(64 - DIGIT_BITS * (digits + 1))) & np.uint64(BINS - 1)
    return np.bincount(digit_of.astype(np.int64), minlength=BINS)


def refine(selection: Selection, counts: npt.NDArray[np.int64]) -> Selection:
    """The selection after one more pass; `counts` is the sum of `count` over all parts."""
    total = int(counts.sum())
    if selection.finished or (not selection.prefix and total <= selection.wanted):
        return Selection(selection.wanted, selection.prefix, selection.above, total)
    from_top = np.cumsum(counts[::-1])
    step = int(np.searchsorted(from_top, selection.wanted - selection.above))
    digit, inside = BINS - 1 - step, int(counts[BINS - 1 - step])
    above = selection.above + int(from_top[step]) - inside
    return Selection(selection.wanted, (*selection.prefix, digit), above, inside)


def _policy(name: str) -> Policy:
    if name not in POLICIES:
        raise PolicyError(f"unknown policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]


def _label_code(action: str) -> int:
    if action not in ACTIONS:
        raise PolicyError(f"unknown action {action!r}; choose one of {', '.join(ACTIONS)}")
    return ACTIONS[action]


def _column(need: str, student: bool) -> str:
    return need if need != "loss" else "student_nll" if student else "ref_nll"


def _missing(policy: Policy, column: str) -> str:
    return f"policy {policy.name!r} needs the column {column}, which is missing: {_FLAGS[column]}"


def _columns(policy: Policy, signals: Signals, length: int | None = None) -> dict[str, npt.NDArray[Any]]:
    columns = {}
    for need in policy.needs:
        name = _column(need, "student_nll" in signals)
        if name not in signals:
            raise PolicyError(_missing(policy, name))
        columns[need] = np.asarray(signals[name])
        if length is not None and columns[need].shape != (length,):
            raise PolicyError(f"column {name} has the shape {columns[need].shape}, expected ({length},)")
    return columns
