"""Scores against float64, thresholds, and budgets that are held."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lacy.cascade.calls import LEND, PAY, WINDOW, Fitted, Fixed, Quantile, forbid, read_fitted, scores, write_fitted
from lacy.schemas.errors import CascadeError


def test_scores_are_those_of_the_definition():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * 5
    found = scores(logits, 4)
    exact = logits.double().numpy()
    words = np.delete(exact, 4, axis=1)
    lse = np.log(np.exp(words).sum(1))
    np.testing.assert_allclose(found.margin, exact[:, 4] - lse, atol=1e-5)
    np.testing.assert_allclose(found.uncertainty, 1 - np.exp(words.max(1) - lse), atol=1e-6)
    np.testing.assert_allclose(found.of("combined", 3.0), found.margin + 3 * found.uncertainty, rtol=1e-6)
    assert found.margin.dtype == found.of("combined", 3.0).dtype == np.float32


def test_a_saturated_call_still_ranks():
    """p(<CALL>) is 1 in float32 for each of these."""
    logits = torch.zeros(3, 4)
    logits[:, 1] = torch.tensor([40.0, 41.0, 42.0])
    margin = scores(logits.bfloat16(), 1).margin
    assert margin[0] < margin[1] < margin[2]


def test_a_vocabulary_without_call():
    assert (scores(torch.zeros(2, 3), None).margin == -np.inf).all()
    assert forbid(torch.zeros(2, 3), None).isfinite().all()


SHAPES = {
    "noise": lambda r, n: r.normal(size=n),
    "rising": lambda r, n: np.linspace(0, 1, n) + r.normal(size=n),
    "falling": lambda r, n: np.linspace(1, 0, n) + r.normal(size=n),
    "constant": lambda r, n: np.ones(n),
    "two values": lambda r, n: (r.random(n) < 0.7).astype(float),
    "waves": lambda r, n: np.sin(np.arange(n) / 7) + r.normal(size=n) / 5,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [0.02, 0.1, 0.22, 0.5, 0.9])
def test_the_budget_is_held(shape, budget):
    """60 texts of 256 positions: the share after the first WINDOW is within 2 points of the budget, in each shape."""
    random = np.random.default_rng(0)
    made = called = 0
    for _ in range(60):
        values = SHAPES[shape](random, 20 + 256).astype(np.float32)
        rule = Quantile(budget, values[:20])
        calls = [rule.decide(value) for value in values[20:]]
        made += 256 - WINDOW
        called += sum(calls[WINDOW:])
    assert called / made == pytest.approx(budget, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=64, max_size=200), st.floats(0, 1))
def test_the_share_of_any_text_is_near_the_budget(values, budget):
    rule = Quantile(budget, np.zeros(0))
    calls = sum(rule.decide(value) for value in values)
    assert -PAY * (1 - budget) - 1 <= calls - budget * len(values) <= LEND * budget + 1


def test_the_ends_of_the_scale():
    values = np.random.default_rng(1).normal(size=50)
    assert not any(Quantile(0.0, values).decide(value) for value in values)
    rule = Quantile(1.0, values + 100)
    assert all(rule.decide(value) for value in values)


def test_the_highest_are_called():
    rule = Quantile(0.25, np.arange(60))
    assert not rule.decide(40.0)
    assert rule.decide(90.0)


def test_a_fixed_threshold():
    assert [Fixed(0.5).decide(value) for value in (0.4, 0.5, 0.6)] == [False, False, True]


def test_a_fitted_weight_comes_back(tmp_path):
    assert read_fitted(tmp_path) is None
    write_fitted(tmp_path, Fitted(weight=2.5, tokens=10))
    assert read_fitted(tmp_path) == Fitted(weight=2.5, tokens=10)
    (tmp_path / "call.json").write_text('{"weight": "many"}')
    with pytest.raises(CascadeError, match="write it again with lacy eval delegation --fit"):
        read_fitted(tmp_path)
