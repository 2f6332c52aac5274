"""Objectives against all logits at once, autograd, and a Python sort."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lacy.schemas.codes import DELEGATE, IGNORE, LEARN
from lacy.trainer.config import LEARN_SOFTMAX, OBJECTIVES
from lacy.trainer.head import Stats, project
from lacy.trainer.objectives import (
    Objective,
    candidates,
    choose,
    columns,
    count,
    hashes,
    ignored,
    losses,
    micro_batch,
    parse,
    quota,
    score,
)

NAN, INF = float("nan"), float("inf")
EOS, CALL, VOCAB, WIDTH = 0, 21, 24, 6
WEIGHT = 1 / 64  # a power of two, so that float32 holds it
Batch = dict[str, Tensor]


def batch_of(rows: int = 4, length: int = 17, seed: int = 0) -> Batch:
    """Documents of about six tokens, with every column, and missing values."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(1, CALL, (rows, length + 1))
    ids[draw.random(ids.shape) < 1 / 6] = EOS
    ref_nll = draw.normal(3, 1, (rows, length)).astype(np.float32)
    judge = draw.integers(-1, 3, (rows, length)).astype(np.float32)
    ref_nll[draw.random(ref_nll.shape) < 0.2] = NAN
    judge[draw.random(judge.shape) < 0.2] = NAN
    label = draw.choice([LEARN, LEARN, DELEGATE, IGNORE], (rows, length)).astype(np.int8)
    arrays = {"ids": ids, "ref_nll": ref_nll, "judge": judge, "label": label, "factual": draw.random(label.shape) < 0.5}
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def model_of(batch: Batch, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states (N, d) and an embedding (V, d)."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch["label"].numel(), WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def run(
    name: str,
    batch: Batch,
    hidden: Tensor,
    weight: Tensor,
    learn_softmax: str = "full",
    budget: float = 0.3,
    fast: bool = True,
    number: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`micro_batch` of one rank with `project`; without `fast`, promises are not used."""
    objective = parse(name)

    def predict(gradient: Tensor | None) -> Stats:
        targets = batch["ids"][:, 1:].flatten()
        return project(hidden, weight, targets, CALL, gradient=gradient if fast else None, rows=7)

    if number is None:
        number = quota(objective, count(objective, batch, EOS).tolist(), budget)
    arguments: dict[str, Any] = {"eos_id": EOS, "quota": number, "weight": WEIGHT, "learn_softmax": learn_softmax}
    return micro_batch(objective, batch, predict, **arguments | options)


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


# The reference: one position at a time, all logits at once.


def best(scores: list[float], possible: list[bool], number: int) -> list[int]:
    """Flat positions, by (-score, position); NaN is lowest."""
    order = sorted(
        (i for i, yes in enumerate(possible) if yes),
        key=lambda i: (-INF if np.float32(scores[i]) > INF else INF if math.isnan(scores[i]) else -scores[i], i),
    )
    return order[:number]


def expected_choice(objective: Objective, batch: Batch, nll: Tensor, budget: float) -> Tensor:
    """(N,) bool."""
    ids, possible, scores = batch["ids"], [], []
    rows, length = batch["label"].shape
    table = hashes(0, 0, rows, length, torch.device("cpu"))
    for row in range(rows):
        for column in range(length):
            at = (row, column)
            loss, reference = float(nll.view_as(batch["label"])[at]), float(batch["ref_nll"][at])
            judge, label = float(batch["judge"][at]), int(batch["label"][at])
            yes, value = {
                "standard": (False, 0.0),
                "lacy": (bool(batch["factual"][at]), loss),
                "lacy-static": (label == DELEGATE, 0.0),
                "loss": (True, loss),
                "rho": (not math.isnan(reference), reference - loss),
                "judge": (judge > 0, judge),
                "random": (True, float(table[at])),
            }[objective.name]
            possible.append(yes and EOS not in (ids[row, column], ids[row, column + 1]))
            scores.append(float(np.float32(value)) if objective.name != "random" else value)
    number = round(budget * len(scores)) if objective.name != "lacy-static" else len(scores)
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[best(scores, possible, number)] = True
    return chosen


def expected_losses(logits: Tensor, targets: Tensor, chosen: Tensor, learn_softmax: str) -> Tensor:
    """(N,) by the definitions of CALL.md."""
    call = torch.full_like(targets, CALL)
    others = logits.clone()
    others[:, CALL] = -INF
    full = functional.cross_entropy(logits, torch.where(chosen, call, targets), reduction="none")
    nll = functional.cross_entropy(others, targets, reduction="none")
    margin = logits[:, CALL] - others.logsumexp(1).detach()
    return {
        "full": full,
        "without_call": torch.where(chosen, full, nll),
        "detached": torch.where(chosen, (1 + (-margin).exp()).log(), nll + (1 + margin.exp()).log()),
    }[learn_softmax]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("learn_softmax", LEARN_SOFTMAX)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_of_all_logits(name: str, learn_softmax: str, fast: bool) -> None:
    objective, batch = parse(name), batch_of()
    hidden, weight = model_of(batch)
    targets = batch["ids"][:, 1:].flatten()
    logits = hidden @ weight.T
    others = logits.detach().clone()
    others[:, CALL] = -INF
    nll = functional.cross_entropy(others, targets, reduction="none")
    chosen = expected_choice(objective, batch, nll, 0.3)
    each = expected_losses(logits, targets, chosen, learn_softmax)
    told = each.detach()
    has_target = torch.ones_like(chosen)
    if objective.name == "lacy-static":
        has_target &= batch["label"].flatten() != IGNORE
    if objective.ignore:
        has_target &= ~chosen
    loss = (each * has_target * WEIGHT).sum()

    found, sums = run(name, batch, hidden, weight, learn_softmax, fast=fast)

    close(found, loss)
    close(gradients(found, hidden, weight), gradients(loss, hidden, weight))
    learns, calls = has_target & ~chosen, has_target & chosen
    close(sums.tolist(), [float(told[learns].sum()), int(learns.sum()), float(told[calls].sum()), int(calls.sum())])
    assert sums.dtype == torch.float64
    assert bool(calls.any()) == (not objective.ignore and objective.name != "standard")


@pytest.mark.parametrize("learn_softmax", LEARN_SOFTMAX)
@pytest.mark.parametrize("name", ["lacy", "ignore-lacy", "lacy-static"])
def test_float32_and_bfloat16(name: str, learn_softmax: str) -> None:
    batch = batch_of(rows=8, length=64)
    exact, leaves = model_of(batch), model_of(batch, torch.float32)
    loss, _ = run(name, batch, *exact, learn_softmax)
    expected = gradients(loss, *exact)
    found, _ = run(name, batch, *leaves, learn_softmax)
    close(found, loss, 1e-5)
    close(gradients(found, *leaves), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = run(name, batch, *leaves, learn_softmax)
    close(rough, loss, 0.01)
    for one, other in zip(gradients(rough, *leaves), expected, strict=True):
        assert (one - other).norm() < 0.1 * other.norm()  # a few positions are chosen otherwise


def test_the_embedding_may_be_the_head() -> None:
    batch = batch_of()
    _, weight = model_of(batch)
    inputs, targets = batch["ids"][:, :-1].flatten(), batch["ids"][:, 1:].flatten()
    chosen = candidates(parse("lacy"), batch, EOS).flatten()
    expected = expected_losses(weight[inputs].tanh() @ weight.T, targets, chosen, "full").sum() * WEIGHT
    found, _ = run("lacy", batch, weight[inputs].tanh(), weight, budget=1.0)
    close(gradients(found, weight), gradients(expected, weight))


# Positions weigh the same.


def part(batch: Batch, rows: slice) -> Batch:
    return {name: values[rows] for name, values in batch.items()}


@pytest.mark.parametrize("learn_softmax", LEARN_SOFTMAX)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_position_weighs_the_same_in_any_micro_batch(name: str, learn_softmax: str) -> None:
    """With a budget of 1 every candidate is chosen, in whatever micro-batch."""
    batch = batch_of()
    hidden, weight = model_of(batch)
    whole, sums = run(name, batch, hidden, weight, learn_softmax, budget=1.0)
    expected = gradients(whole, hidden, weight)
    found = [torch.zeros_like(x) for x in expected]
    told = torch.zeros_like(sums)
    for rows in (slice(0, 1), slice(1, 4)):
        states = hidden.view(4, -1, WIDTH)[rows].flatten(0, 1)
        loss, more = run(name, part(batch, rows), states, weight, learn_softmax, budget=1.0)
        told += more
        for into, grad in zip(found, gradients(loss, hidden, weight), strict=True):
            into += grad
    close(found, expected)
    close(told, sums)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_together_are_as_one(name: str) -> None:
    batch = batch_of()
    hidden, weight = model_of(batch)
    number = quota(parse(name), count(parse(name), batch, EOS).tolist(), 0.3)
    whole, sums = run(name, batch, hidden, weight, number=number)
    keys: list[Tensor] = []

    def rank(at: int, joined: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        rows = slice(2 * at, 2 * at + 2)
        states = hidden.view(4, -1, WIDTH)[rows].flatten(0, 1)
        return run(name, part(batch, rows), states, weight, number=number, joined=joined, rank=at, first_row=2 * at)

    def tell(own: Tensor) -> Tensor:
        keys.append(own)
        return own.repeat(2)

    for at in (0, 1):
        rank(at, tell)
    found = [rank(at, lambda _: torch.cat(keys)) for at in (0, 1)]
    close(found[0][1] + found[1][1], sums)
    close(gradients(found[0][0] + found[1][0], hidden, weight), gradients(whole, hidden, weight))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_promised_where_weights_are_known_beforehand(name: str) -> None:
    objective, batch = parse(name), batch_of()
    hidden, weight = model_of(batch)
    promises: list[Tensor | None] = []

    def predict(gradient: Tensor | None) -> Stats:
        promises.append(gradient)
        return project(hidden, weight, batch["ids"][:, 1:].flatten(), CALL, gradient=gradient)

    for learn_softmax in LEARN_SOFTMAX:
        micro_batch(objective, batch, predict, eos_id=EOS, quota=5, weight=WEIGHT, learn_softmax=learn_softmax)
    full, *others = promises
    assert (full is None) == (name in ("ignore-lacy", "ignore-loss", "ignore-rho"))
    assert others == [None, None]


@pytest.mark.parametrize("learn_softmax", LEARN_SOFTMAX)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_learn_is_no_loss_and_no_gradient(name: str, learn_softmax: str) -> None:
    batch = batch_of()
    batch["label"].fill_(IGNORE)
    hidden, weight = model_of(batch, torch.float32)
    loss, sums = run(name, batch, hidden, weight, learn_softmax)
    found = gradients(loss, hidden, weight)
    assert all(x.isfinite().all() for x in (loss, *found))
    if "static" in name:
        assert loss == 0 and not sums.any() and not any(x.any() for x in found)
    batch["ids"].fill_(EOS)  # no candidates
    loss, sums = run(name, batch, hidden, weight, learn_softmax)
    assert (int(sums[1]), int(sums[3])) == (0 if "static" in name else 68, 0)
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["ignore-loss", "ignore-random"])
def test_everything_may_be_ignored(name: str) -> None:
    batch = batch_of()
    batch["ids"].fill_(5)
    hidden, weight = model_of(batch)
    loss, sums = run(name, batch, hidden, weight, budget=1.0)
    assert loss == 0 and not sums.any()
    assert not any(x.any() for x in gradients(loss, hidden, weight))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_that_is_not_finite_does_not_crash(name: str) -> None:
    batch = batch_of()
    hidden, weight = model_of(batch)
    hidden.data[3] = NAN
    loss, sums = run(name, batch, hidden, weight)
    loss.backward()
    assert int(sums[1] + sums[3]) > 0


# How many.


def test_names() -> None:
    assert parse("lacy-static") == Objective("lacy-static", ignore=False)
    assert parse("ignore-lacy") == Objective("lacy", ignore=True)
    assert len(OBJECTIVES) == 13
    for unknown in ("ignore-standard", "ignore-ignore-lacy", "gain", ""):
        with pytest.raises(ValueError, match=f"unknown objective '{unknown}'; choose one of standard, lacy, lacy-stat"):
            parse(unknown)
    with pytest.raises(ValueError, match="unknown learn_softmax 'half'; choose one of full, without_call, detached"):
        losses(Stats(*torch.zeros(4, 2)), torch.zeros(2, dtype=torch.bool), "half")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_needs_its_columns_alone(name: str) -> None:
    batch = batch_of()
    objective, whole = parse(name), run(name, batch, *model_of(batch))[0]
    for column in {"label", "factual", "ref_nll", "judge"} - columns(objective):
        del batch[column]
    hidden, weight = model_of(batch_of())
    assert run(name, batch, hidden, weight)[0] == whole
    assert set(batch) == {"ids"} | columns(objective)
    assert objective.dynamic == (objective.name in ("lacy", "loss", "rho"))


def test_candidates_by_hand() -> None:
    batch = {
        "ids": torch.tensor([[EOS, 5, 6, 7, EOS, 8, 9]], dtype=torch.int32),
        "factual": torch.tensor([[True, True, False, True, True, True]]),
        "ref_nll": torch.tensor([[1.0, NAN, 2.0, INF, 1.0, 3.0]]),
        "judge": torch.tensor([[1.0, 0.5, NAN, 1.0, 1.0, 0.0]]),
        "label": torch.tensor([[DELEGATE, LEARN, IGNORE, DELEGATE, IGNORE, DELEGATE]], dtype=torch.int8),
    }
    expected = {  # targets 5, 6, 7, the end token, 8, 9, of which 5 and 8 begin documents
        "standard": [],
        "lacy": [1, 5],
        "lacy-static": [5],
        "loss": [1, 2, 5],
        "rho": [2, 5],
        "judge": [1],
        "random": [1, 2, 5],
    }
    for name, positions in expected.items():
        found = candidates(parse(name), batch, EOS)
        assert found.shape == (1, 6)
        assert found.flatten().nonzero().flatten().tolist() == positions, name
        without = 2 if name == "lacy-static" else 0
        assert count(parse(name), batch, EOS).tolist() == [len(positions), 6, without]
        assert int(ignored(parse(name), batch).sum()) == without


def test_quota() -> None:
    assert quota(parse("lacy"), [100, 1000, 0], 0.15) == 100
    assert quota(parse("lacy"), [200, 1000, 0], 0.15) == 150
    assert quota(parse("ignore-random"), [200, 30, 0], 0.15) == 4  # 4.5, half to even
    assert quota(parse("lacy-static"), [200, 1000, 30], 0.15) == 200
    assert quota(parse("standard"), [0, 1000, 0], 0.15) == 0
    with pytest.raises(ValueError, match=r"between 0 and 1, not 15"):
        quota(parse("lacy"), [200, 1000, 0], 15)


def test_a_count_of_targets_before_the_forward_pass_is_the_count_after_it() -> None:
    batch = batch_of()
    for name in OBJECTIVES:
        objective = parse(name)
        possible, positions, without = count(objective, batch, EOS).tolist()
        taken = quota(objective, [possible, positions, without], 0.3)
        _, sums = run(name, batch, *model_of(batch))
        assert int(sums[1]) == positions - without - taken
        assert int(sums[3]) == (0 if objective.ignore else taken)


# Which.

FEW = st.sampled_from([-INF, -1.5, -0.0, 0.0, 1e-40, 2.0, 2.0000002, INF, NAN])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_highest_scores_are_chosen_and_ties_go_to_the_earlier(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    flat = st.lists(FEW | st.floats(width=32), min_size=rows * length, max_size=rows * length)
    scores = torch.tensor(data.draw(flat)).view(rows, length)
    mask = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    possible = torch.tensor(mask).view(rows, length)
    number = data.draw(st.integers(0, int(possible.sum())))
    found = choose(possible, scores, number)
    values = [-INF if math.isnan(x) else x for x in scores.flatten().tolist()]
    order = sorted((i for i, yes in enumerate(mask) if yes), key=lambda i: (-values[i], i))
    assert found.flatten().nonzero().flatten().tolist() == sorted(order[:number])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000), st.integers(0, 40))
def test_ranks_choose_together(ranks: int, seed: int, number: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (ranks * 2, 5), generator=generator).float()
    possible = torch.rand(ranks * 2, 5, generator=generator) < 0.6
    number = min(number, int(possible.sum()))
    keys: list[Tensor] = []

    def tell(own: Tensor) -> Tensor:
        keys.append(own)
        return own.repeat(ranks)

    mine = list(zip(possible.split(2), scores.split(2), strict=True))
    for one in mine:
        choose(*one, number, joined=tell)
    found = [choose(*one, number, joined=lambda _: torch.cat(keys), rank=rank) for rank, one in enumerate(mine)]
    assert torch.equal(torch.cat(found), choose(possible, scores, number))


def test_the_current_loss_is_without_a_gradient_and_has_no_call_in_it() -> None:
    batch = batch_of()
    nll = torch.rand(4, 17, requires_grad=True)
    assert torch.equal(score(parse("lacy"), batch, nll), nll)
    assert not score(parse("rho"), batch, nll).requires_grad
    with pytest.raises(ValueError, match="nothing to rank by"):
        score(parse("lacy"), batch)


# random.

MASK = (1 << 64) - 1


def mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


@given(st.integers(0, MASK), st.integers(0, 1 << 40))
@settings(max_examples=30, deadline=None)
def test_hashes_are_splitmix64(seed: int, first_row: int) -> None:
    found = hashes(seed, first_row, 2, 3, torch.device("cpu"))
    expected = [
        [mixed((mixed((mixed(seed) + first_row + r) & MASK) + c) & MASK) >> 33 for c in range(3)] for r in (0, 1)
    ]
    assert found.dtype == torch.int32
    assert found.tolist() == expected


def test_random_depends_on_seed_row_and_column_alone() -> None:
    batch, objective = batch_of(rows=6), parse("random")
    whole = score(objective, batch, seed=3, first_row=10)
    parts = [score(objective, part(batch, slice(at, at + 2)), seed=3, first_row=10 + at) for at in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(score(objective, batch, seed=4, first_row=10), whole)
    assert len(whole.unique()) == whole.numel()


def test_random_meets_its_share_and_is_even() -> None:
    batch = batch_of(rows=64, length=256)
    batch["ids"].fill_(5)
    objective = parse("random")
    chosen = choose(candidates(objective, batch, EOS), score(objective, batch, seed=1), 2458)
    assert int(chosen.sum()) == 2458
    assert abs(float(chosen[:, :128].double().mean()) - 0.15) < 0.01
    assert abs(float(chosen[:32].double().mean()) - 0.15) < 0.01


# Losses.


def test_losses_by_the_formulas() -> None:
    """With the numbers of one position as leaves: values, and what moves them."""
    numbers = torch.tensor([2.0, 0.5, 1.2], dtype=torch.float64).requires_grad_()
    lse, target, call = numbers
    margin, chosen = 1.2 - 2.0, torch.tensor([True, False])
    stats = Stats(*(x.expand(2) for x in (lse, target, call, torch.logaddexp(lse, call))))
    up, down = math.log1p(math.exp(margin)), math.log1p(math.exp(-margin))
    p = 1 / (1 + math.exp(-margin))
    expected = {  # (chosen, learn), and their gradients for lse, target and call
        "full": ([down, 1.5 + up], [1 - p, 0, p - 1], [1 - p, -1, p]),
        "without_call": ([down, 1.5], [1 - p, 0, p - 1], [1, -1, 0]),
        "detached": ([down, 1.5 + up], [0, 0, p - 1], [1, -1, p]),
    }
    for name, (values, *rows) in expected.items():
        found = losses(stats, chosen, name)
        close(found, torch.tensor(values, dtype=torch.float64))
        for position, row in enumerate(rows):
            grad = torch.autograd.grad(found[position], numbers, retain_graph=True)[0]
            close(grad, torch.tensor(row, dtype=torch.float64))


@pytest.mark.parametrize("learn_softmax", LEARN_SOFTMAX)
@pytest.mark.parametrize("margin", [-1e4, -90.0, 90.0, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(margin: float, learn_softmax: str) -> None:
    batch = batch_of()
    weight = torch.eye(VOCAB).requires_grad_()
    hidden = torch.randn(68, VOCAB)
    hidden[:, CALL] = margin
    hidden[::3, 5] = -1e30
    hidden.requires_grad_()
    for name in OBJECTIVES:
        loss, _ = run(name, batch, hidden, weight, learn_softmax)
        assert loss.isfinite()
        assert all(x.isfinite().all() for x in gradients(loss, hidden, weight))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_waits_for_the_device(name: str) -> None:
    """A tensor on the meta device has no values to wait for."""
    batch = {column: values.to("meta") for column, values in batch_of().items()}
    hidden, weight = (x.detach().to("meta").requires_grad_() for x in model_of(batch_of()))
    for learn_softmax in LEARN_SOFTMAX:
        loss, _ = run(name, batch, hidden, weight, learn_softmax, number=5)
        loss.backward()
