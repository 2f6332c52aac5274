"""Percentile bootstrap intervals over clusters: documents or prompts, whose tokens depend on one another.

A resample draws as many clusters as there are, with replacement; a cluster that is drawn twice counts twice, with all
its units. A statistic is therefore a function of multiplicities, built once and evaluated for each resample:

    right = mean(document, correct)                    # document (N,) int: the cluster of each token
    interval(documents, right)                         # Interval(value, low, high)
    difference(documents, auc(document, margin, wrong), auc(document, uncertainty, wrong))

Tokens are sorted once for the rank statistics, which then cost a pass over them in each resample. Percentile
intervals are those of Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

RESAMPLES: Final = 1000
LEVEL: Final = 0.95
MOST_RANKED: Final = 200_000  # units of a rank statistic; of more, a sample at even distances over the ranks is used
_BLOCK: Final = 1 << 20  # multiplicities in memory at a time

# (R, D) integers, how often each resample has each cluster, to its values, (R,) float64; NaN where it is undefined
Statistic = Callable[[np.ndarray], np.ndarray]


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def interval(
    clusters: int, statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval | None:
    """A statistic of D clusters, with the interval of `level` of its resamples; None for fewer than two clusters.

    It is also None if the statistic is undefined, like an AUC without positives; undefined resamples do not count.
    """
    if clusters < 2:
        return None
    value = float(statistic(np.ones((1, clusters), np.int32))[0])
    return _around(value, resampled(clusters, statistic, resamples=resamples, seed=seed), level)


def difference(
    clusters: int, a: Statistic, b: Statistic, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval | None:
    """The `interval` of a - b, paired: both statistics see the same resamples of the same D clusters."""

    def both(multiplicities: np.ndarray) -> np.ndarray:
        return a(multiplicities) - b(multiplicities)

    return interval(clusters, both, resamples=resamples, seed=seed, level=level)


def resampled(clusters: int, statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(resamples,) float64: the statistic's values. Seed and number of clusters alone determine the resamples."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // clusters)
    values = []
    for first in range(0, resamples, rows):
        count = min(rows, resamples - first)
        drawn = rng.integers(clusters, size=(count, clusters)) + np.arange(count)[:, None] * clusters
        multiplicities = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        values.append(statistic(multiplicities.astype(np.int32)))
    return np.concatenate(values)


def bounds(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """The percentiles that enclose `level` of the resampled values, without NaN; None if all are NaN."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean(cluster: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None) -> Statistic:
    """The mean of N units with `values` (N,) in clusters (N,) int, optionally weighted by `weights` (N,).

    Weights of 0 and 1 give the mean of a subset, such as the share of correct tokens among the factual ones.
    """
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    total = np.bincount(cluster, values * weights)
    weight = np.bincount(cluster, weights)

    def statistic(multiplicities: np.ndarray) -> np.ndarray:
        counts = multiplicities[:, : len(total)].astype(np.float64)
        with np.errstate(invalid="ignore"):
            return (counts @ total) / (counts @ weight)

    return statistic


def auc(cluster: np.ndarray, score: np.ndarray, wanted: np.ndarray, most: int = MOST_RANKED) -> Statistic:
    """The area under the ROC curve: the probability that a wanted unit scores higher than another, ties counted half.

    cluster (N,) int, score (N,) finite floats, wanted (N,) bool. Undefined if either kind is missing.
    """
    ranked = _rank(cluster, score, wanted, most)

    def one(multiplicities: np.ndarray) -> float:
        called, hits = ranked.counts(multiplicities)
        misses = called - hits
        pairs = float(hits[-1]) * float(misses[-1])
        return float(np.diff(misses) @ (hits[1:] + hits[:-1])) / 2 / pairs if pairs else np.nan

    return lambda multiplicities: np.array([one(row) for row in multiplicities])


def average_precision(cluster: np.ndarray, score: np.ndarray, wanted: np.ndarray, most: int = MOST_RANKED) -> Statistic:
    """The mean over wanted units of the precision among all units that score as high, as in scikit-learn.

    Arguments as for `auc`; undefined where it is.
    """
    ranked = _rank(cluster, score, wanted, most)

    def one(multiplicities: np.ndarray) -> float:
        called, hits = ranked.counts(multiplicities)
        if hits[-1] in (0, called[-1]):
            return np.nan
        return float(np.diff(hits) @ (hits[1:] / np.maximum(called[1:], 1))) / float(hits[-1])

    return lambda multiplicities: np.array([one(row) for row in multiplicities])


def _around(value: float, values: np.ndarray, level: float) -> Interval | None:
    limits = bounds(values, level)
    return None if np.isnan(value) or limits is None else Interval(value, *limits)


@dataclass(frozen=True)
class _Ranked:
    """Units in descending order of score, in groups of equal scores."""

    cluster: np.ndarray  # (N,)
    ends: np.ndarray  # (groups + 1,) units before each group, and in total
    wanted: np.ndarray  # indices of the wanted units
    wanted_ends: np.ndarray  # (groups + 1,) as `ends`, of wanted units

    def counts(self, multiplicities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(groups + 1,) float64 each: units, and wanted units, down to each group, beginning with 0."""
        weights = multiplicities[self.cluster]
        return _sums(weights)[self.ends], _sums(weights[self.wanted])[self.wanted_ends]


def _rank(cluster: np.ndarray, score: np.ndarray, wanted: np.ndarray, most: int) -> _Ranked:
    order = np.argsort(-score, kind="stable")
    if len(order) > most:
        order = order[_thinned(wanted[order], most)]
    score, wanted = score[order], wanted[order]
    ends = np.flatnonzero(np.r_[True, score[1:] != score[:-1], True]) if len(order) else np.zeros(1, np.int64)
    hits = np.flatnonzero(wanted)
    return _Ranked(cluster[order], ends, hits, np.searchsorted(hits, ends))


def _thinned(wanted: np.ndarray, most: int) -> np.ndarray:
    """Indices of about `most` of N ordered units, at even distances among the wanted and among the other ones.

    The sample's curve is then that of all units, to within one step.
    """
    kept = []
    for kind in (np.flatnonzero(wanted), np.flatnonzero(~wanted)):
        count = -(-len(kind) * most // len(wanted))
        kept.append(kind[((np.arange(count) + 0.5) * (len(kind) / max(1, count))).astype(np.int64)])
    return np.sort(np.concatenate(kept))


def _sums(weights: np.ndarray) -> np.ndarray:
    """(N + 1,) float64: exact sums of the integers before each index."""
    sums = np.zeros(len(weights) + 1)
    np.cumsum(weights, out=sums[1:])
    return sums
