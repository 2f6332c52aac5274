"""Statistics and their intervals against resampling by hand, scipy and scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from lacy.cascade.evaluation import bootstrap
from lacy.cascade.evaluation.bootstrap import (
    Interval,
    auc,
    average_precision,
    bounds,
    difference,
    interval,
    mean,
    resampled,
)

CLUSTERS = 12
SKLEARN = {auc: roc_auc_score, average_precision: average_precision_score}


def units(seed=0, n=150, levels=None):
    """cluster, score, wanted; with `levels`, that many different scores."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(CLUSTERS, size=n)
    wanted = rng.random(n) < 0.3
    score = rng.normal(size=n) + wanted + 0.3 * cluster
    if levels:
        score = np.floor(score / (np.ptp(score) + 1e-9) * levels)
    return cluster, score.astype(np.float32), wanted


def drawn(seed, resamples, clusters=CLUSTERS):
    """The clusters of each resample."""
    return np.random.default_rng(seed).integers(clusters, size=(resamples, clusters))


def taken(cluster, clusters):
    """The places of the units of some clusters, as often as these are named."""
    return np.concatenate([np.flatnonzero(cluster == one) for one in clusters])


def test_hand_computed_ranks():
    """Scores 4 3 3 1, the wanted ones 4 and the first 3: pairs won 1, 1, 1/2 and 1; precisions 1 and 2/3."""
    cluster, score = np.arange(4), np.array([4.0, 3, 3, 1])
    wanted = np.array([True, True, False, False])
    once = np.ones((1, 4), np.int32)
    assert auc(cluster, score, wanted)(once) == pytest.approx(3.5 / 4)
    assert average_precision(cluster, score, wanted)(once) == pytest.approx((1 + 2 / 3) / 2)
    # The first unit three times, the third not at all: all pairs are won.
    assert auc(cluster, score, wanted)(np.array([[3, 1, 0, 1]])) == pytest.approx(1)
    # The third unit three times: of 8 pairs 3 are tied.
    assert auc(cluster, score, wanted)(np.array([[1, 1, 3, 1]])) == pytest.approx(6.5 / 8)
    assert average_precision(cluster, score, wanted)(np.array([[1, 1, 3, 1]])) == pytest.approx((1 + 2 / 5) / 2)


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("statistic", SKLEARN)
def test_a_resample_weighs_units_as_copies_of_them_would(statistic, levels):
    cluster, score, wanted = units(levels=levels)
    multiplicities = np.random.default_rng(1).integers(3, size=(20, CLUSTERS))
    found = statistic(cluster, score, wanted)(multiplicities)
    for row, value in zip(multiplicities, found, strict=True):
        copies = taken(cluster, np.repeat(np.arange(CLUSTERS), row))
        assert value == pytest.approx(SKLEARN[statistic](wanted[copies], score[copies]), abs=1e-12)


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_intervals_are_percentiles_of_resampled_clusters(level):
    cluster, score, wanted = units(levels=10)
    by_hand = []
    for clusters in drawn(3, 200):
        copies = taken(cluster, clusters)
        by_hand.append(roc_auc_score(wanted[copies], score[copies]))
    low, high = np.quantile(by_hand, [(1 - level) / 2, (1 + level) / 2])
    found = interval(CLUSTERS, auc(cluster, score, wanted), resamples=200, seed=3, level=level)
    assert found == pytest.approx((roc_auc_score(wanted, score), low, high))


def test_means_by_hand():
    cluster, score, wanted = units()
    some, all_of = [], []
    for clusters in drawn(0, 100):
        copies = taken(cluster, clusters)
        all_of.append(score[copies].mean(dtype=np.float64))
        some.append(score[copies][wanted[copies]].mean(dtype=np.float64))
    assert resampled(CLUSTERS, mean(cluster, score), resamples=100) == pytest.approx(all_of)
    assert resampled(CLUSTERS, mean(cluster, score, wanted), resamples=100) == pytest.approx(some)


def test_differences_are_paired():
    cluster, score, wanted = units()
    other = score + np.random.default_rng(8).normal(size=len(score)).astype(np.float32)
    a, b = auc(cluster, score, wanted), auc(cluster, other, wanted)
    by_hand = []
    for clusters in drawn(0, 150):
        copies = taken(cluster, clusters)
        by_hand.append(roc_auc_score(wanted[copies], score[copies]) - roc_auc_score(wanted[copies], other[copies]))
    value = roc_auc_score(wanted, score) - roc_auc_score(wanted, other)
    found = difference(CLUSTERS, a, b, resamples=150)
    assert found == pytest.approx((value, *np.quantile(by_hand, [0.025, 0.975])))
    assert difference(CLUSTERS, a, a) == Interval(0, 0, 0)


def test_a_mean_as_scipy_has_it():
    """Every unit a cluster of its own is the plain bootstrap."""
    values = np.random.default_rng(5).exponential(size=60)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    found = interval(60, mean(np.arange(60), values), resamples=20_000)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_intervals_cover_a_mean():
    """Of a normal mean, with clusters that differ: 95 % intervals hold it nearly as often, those of tokens do not."""
    rng = np.random.default_rng(11)
    clusters, size, trials = 40, 10, 300
    cluster = np.repeat(np.arange(clusters), size)
    covered = naive = 0
    for trial in range(trials):
        values = rng.normal(size=clusters)[cluster] + rng.normal(size=clusters * size)
        found = interval(clusters, mean(cluster, values), resamples=400, seed=trial)
        wrong = interval(len(values), mean(np.arange(len(values)), values), resamples=400, seed=trial)
        assert found is not None and wrong is not None
        covered += found.low <= 0 <= found.high
        naive += wrong.low <= 0 <= wrong.high
    assert 0.91 <= covered / trials <= 0.975
    assert naive / trials < 0.7


def test_the_seed_decides(monkeypatch):
    cluster, score, wanted = units()
    statistic = auc(cluster, score, wanted)
    first = resampled(CLUSTERS, statistic, resamples=50)
    assert np.array_equal(resampled(CLUSTERS, statistic, resamples=50), first)
    assert not np.array_equal(resampled(CLUSTERS, statistic, resamples=50, seed=1), first)
    monkeypatch.setattr(bootstrap, "_BLOCK", 7 * CLUSTERS)  # in blocks of 7 resamples
    assert np.array_equal(resampled(CLUSTERS, statistic, resamples=50), first)


@pytest.mark.parametrize("levels", [None, 30])
@pytest.mark.parametrize("statistic", SKLEARN)
def test_of_many_units_a_sample_serves(statistic, levels):
    cluster, score, wanted = units(n=60_000, levels=levels)
    whole, sample = statistic(cluster, score, wanted), statistic(cluster, score, wanted, most=6000)
    once = np.ones((1, CLUSTERS), np.int32)
    assert sample(once) == pytest.approx(whole(once), abs=1e-3)
    assert sample(once) == statistic(cluster, score, wanted, most=6000)(once)
    few, many = (interval(CLUSTERS, one, resamples=100) for one in (sample, whole))
    assert few == pytest.approx(many, abs=0.01)


def test_where_there_is_nothing_to_count():
    cluster, score, wanted = units()
    assert interval(1, mean(np.zeros(5, int), np.arange(5))) is None  # one cluster tells nothing of others
    nobody = np.zeros_like(wanted)
    for statistic in SKLEARN:
        assert interval(CLUSTERS, statistic(cluster, score, nobody)) is None
        assert interval(CLUSTERS, statistic(cluster, score, ~nobody)) is None
        assert interval(3, statistic(cluster[:0], score[:0], wanted[:0])) is None
    assert interval(CLUSTERS, mean(cluster, score, nobody)) is None
    assert bounds(np.full(3, np.nan)) is None


def test_resamples_without_a_value_do_not_count():
    """Half of the clusters have all wanted units, or none."""
    cluster, wanted = np.arange(4), np.array([True, False, False, False])
    values = resampled(4, auc(cluster, np.array([3.0, 4, 2, 1]), wanted), resamples=300)
    without = (drawn(0, 300, 4) != 0).all(1) | (drawn(0, 300, 4) == 0).all(1)
    assert np.array_equal(np.isnan(values), without)
    assert without.any()
    found = bounds(values)
    assert found == pytest.approx(tuple(np.quantile(values[~without], [0.025, 0.975])))


def test_a_cluster_without_units_is_drawn_too():
    cluster, values = np.array([0, 0, 1]), np.array([1.0, 2, 3])
    with_empty = resampled(4, mean(cluster, values), resamples=64)
    for clusters, value in zip(drawn(0, 64, 4), with_empty, strict=True):
        copies = taken(cluster, clusters)
        assert value == pytest.approx(values[copies].mean() if len(copies) else np.nan, nan_ok=True)
