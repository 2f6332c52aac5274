"""The chunked projection against all logits at once and autograd."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lacy.trainer.head import Stats, chunk_rows, measure, project

N, VOCAB, WIDTH, CALL = 23, 40, 8, 37  # rows of the vocabulary behind <CALL> are padding


def inputs(dtype: torch.dtype = torch.float64, n: int = N, vocab: int = VOCAB, scale: float = 1.0) -> Any:
    """hidden, weight, targets, and a weight for each position, of which some are 0."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, CALL, (n,), generator=generator)
    gradient = torch.rand(n, generator=generator, dtype=torch.float64) * (torch.arange(n) % 4 > 0)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, gradient.to(dtype)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, call_id: int = CALL) -> Stats:
    logits = hidden @ weight.T
    others = [column for column in range(len(weight)) if column != call_id]
    target = logits.gather(1, targets[:, None]).squeeze(1)
    return Stats(logits[:, others].logsumexp(1), target, logits[:, call_id], logits.logsumexp(1))


def total(stats: Stats, gradient: Tensor, delegated: Tensor | None = None) -> Tensor:
    """The loss that `gradient` is a promise for."""
    delegated = torch.arange(len(gradient)) % 3 == 0 if delegated is None else delegated
    return (gradient * torch.where(delegated, stats.full - stats.call, stats.full - stats.target)).sum()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 22, 23, 100, None])
def test_statistics_and_gradients_are_those_of_all_logits(rows: int | None, promised: bool) -> None:
    hidden, weight, targets, gradient = inputs()
    expected = plain(hidden, weight, targets)
    found = project(hidden, weight, targets, CALL, gradient=gradient if promised else None, rows=rows)
    close(found, expected)
    close(found.nll, expected.nll)
    close(found.margin, expected.margin)
    close(
        gradients(total(found, gradient), hidden, weight),
        gradients(total(expected, gradient), hidden, weight),
    )


def test_any_function_of_the_statistics_is_differentiable() -> None:
    hidden, weight, targets, _ = inputs()

    def some(stats: Stats) -> Tensor:
        return (stats.lse * stats.target.sin() + stats.call.exp() / 9 - stats.full**2).sum()

    close(
        gradients(some(project(hidden, weight, targets, CALL, rows=4)), hidden, weight),
        gradients(some(plain(hidden, weight, targets)), hidden, weight),
    )


@pytest.mark.parametrize("promised", [False, True])
def test_the_weight_may_be_the_embedding(promised: bool) -> None:
    _, weight, targets, gradient = inputs()

    def hidden() -> Tensor:
        return weight[targets.roll(1)].tanh()

    found = project(hidden(), weight, targets, CALL, gradient=gradient if promised else None, rows=7)
    expected = plain(hidden(), weight, targets)
    close(gradients(total(found, gradient), weight), gradients(total(expected, gradient), weight))


@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_of_the_two_may_be_frozen(frozen: int, promised: bool) -> None:
    hidden, weight, targets, gradient = inputs()
    (hidden, weight)[frozen].requires_grad_(False)
    leaf = (hidden, weight)[1 - frozen]
    found = project(hidden, weight, targets, CALL, gradient=gradient if promised else None, rows=7)
    expected = plain(hidden, weight, targets)
    close(gradients(total(found, gradient), leaf), gradients(total(expected, gradient), leaf))


@pytest.mark.parametrize("promised", [False, True])
def test_a_target_may_be_call(promised: bool) -> None:
    hidden, weight, targets, gradient = inputs()
    targets[::2] = CALL
    found = project(hidden, weight, targets, CALL, gradient=gradient if promised else None, rows=7)
    expected = plain(hidden, weight, targets)
    close(found, expected)
    close(
        gradients(total(found, gradient), hidden, weight),
        gradients(total(expected, gradient), hidden, weight),
    )


@pytest.mark.parametrize("promised", [False, True])
def test_no_positions(promised: bool) -> None:
    hidden, weight, targets, gradient = inputs(n=0)
    found = project(hidden, weight, targets, CALL, gradient=gradient if promised else None)
    assert found.nll.shape == (0,)
    assert not gradients(total(found, gradient), weight)[0].any()


def test_a_promise_may_be_one_number() -> None:
    hidden, weight, targets, _ = inputs()
    scale = torch.tensor(0.25)
    found = project(hidden, weight, targets, CALL, gradient=scale, rows=7)
    close(
        gradients(total(found, scale.expand(N)), hidden, weight),
        gradients(total(plain(hidden, weight, targets), scale.expand(N)), hidden, weight),
    )


# A promise that is not kept.


def test_another_gradient_than_was_promised_is_an_error() -> None:
    hidden, weight, targets, gradient = inputs()

    def stats() -> Stats:
        return project(hidden, weight, targets, CALL, gradient=gradient, rows=7)

    for loss in (2 * total(stats(), gradient), stats().target.sum(), total(stats(), gradient.roll(1))):
        with pytest.raises(RuntimeError, match="not the one that `project` was promised"):
            loss.backward()
    assert not stats().lse.requires_grad


def test_promised_gradients_serve_one_backward_pass() -> None:
    hidden, weight, targets, gradient = inputs()
    loss = total(project(hidden, weight, targets, CALL, gradient=gradient), gradient)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


# Without gradients.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    hidden, weight, targets, gradient = inputs()
    with mode():
        found = project(hidden, weight, targets, CALL, gradient=gradient, rows=7)
        close(found, plain(hidden, weight, targets))
        assert not any(x.requires_grad for x in found)
        close(measure(hidden, weight, targets, CALL, rows=7)[:3], found[:3])


def test_correct_is_whether_the_likeliest_word_is_the_true_one() -> None:
    hidden, weight, targets, _ = inputs()
    logits = (hidden @ weight.T).detach()
    assert (logits.argmax(1) == CALL).any()
    logits[:, CALL] = -torch.inf
    targets[::2] = logits.argmax(1)[::2]
    found = measure(hidden, weight, targets, CALL, rows=7)
    assert found.correct.tolist() == (logits.argmax(1) == targets).tolist()
    assert not found.lse.requires_grad


# Precision.


@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_lower_precision(kind: str, promised: bool) -> None:
    hidden, weight, targets, gradient = inputs()
    expected = plain(hidden, weight, targets)
    exact = gradients(total(expected, gradient), hidden, weight)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    hidden, weight, targets, gradient = inputs(dtype)
    gradient = gradient.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = project(hidden, weight, targets, CALL, gradient=gradient if promised else None, rows=7)
        loss = total(found, gradient)
    assert all(x.dtype == torch.float32 for x in found)
    # bfloat16 has 8 bits: products of WIDTH rounded numbers, and logits of about 4
    tolerance = 1e-5 if kind == "float32" else 0.06
    close(found, [x.float() for x in expected], tolerance)
    for one, other in zip(gradients(loss, hidden, weight), exact, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() < (1e-6 if kind == "float32" else 0.02) * other.norm()


def test_the_gradient_of_the_weight_is_summed_in_float32() -> None:
    """In bfloat16 a sum of equal parts stops growing at 256 times one of them."""
    hidden, weight, targets = torch.ones(2000, WIDTH), torch.zeros(VOCAB, WIDTH), torch.zeros(2000, dtype=torch.long)
    weight.requires_grad_()
    for gradient in (None, torch.ones(2000)):
        with torch.autocast("cpu", torch.bfloat16):
            stats = project(hidden, weight, targets, CALL, gradient=gradient, rows=2)
        found = gradients((stats.full - stats.target).sum(), weight)[0]
        close(found[1:], torch.full((VOCAB - 1, WIDTH), 2000 / VOCAB), 0.005)


@pytest.mark.parametrize("promised", [False, True])
def test_a_certain_call_leaves_the_other_numbers_exact(promised: bool) -> None:
    """p(<CALL>) = 1 in float32, and other words so unlikely that only their differences count."""
    weight = torch.eye(VOCAB)
    hidden = torch.zeros(3, VOCAB)
    hidden[:, CALL] = torch.tensor([100.0, 1e4, 0.0])
    hidden[:, 5] = torch.tensor([2.0, 2.0, -1e30])
    targets = torch.tensor([5, 6, 5])
    weight.requires_grad_(), hidden.requires_grad_()
    gradient = torch.ones(3)
    found = project(hidden, weight, targets, CALL, gradient=gradient if promised else None, rows=2)
    expected = plain(hidden.double(), weight.double(), targets)
    close(found.nll, expected.nll.float(), 1e-6)
    close(found.margin, expected.margin.float(), 1e-6)
    results = gradients(total(found, gradient), hidden, weight)
    close(results, gradients(total(expected, gradient), hidden, weight), 1e-6)
    assert all(x.isfinite().all() for x in results)


def test_a_large_vocabulary_with_the_chunks_of_the_device() -> None:
    hidden, weight, targets, gradient = inputs(torch.float32, n=700, vocab=50_304)
    assert chunk_rows(50_304, torch.device("cpu")) < 700
    expected = plain(hidden, weight, targets)
    results = gradients(total(expected, gradient), hidden, weight)
    for promise in (gradient, None):
        found = project(hidden, weight, targets, CALL, gradient=promise)
        close(found, expected, 1e-5)
        close(gradients(total(found, gradient), hidden, weight), results, 1e-4)


def test_rows_of_a_chunk_are_bounded_by_bytes() -> None:
    for kind, vocab in itertools.product(("cpu", "cuda"), (100, 4096, 32_768, 262_144)):
        rows = chunk_rows(vocab, torch.device(kind))
        assert 64 <= rows <= 8192
        assert rows * vocab * 4 <= 1 << 29


# Memory.


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tensors(found))])
        return found


def tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, tuple | list):
        for part in found:
            yield from tensors(part)


def test_no_more_than_one_chunk_of_logits_exists() -> None:
    hidden, weight, targets, gradient = inputs(torch.float32, n=256, vocab=512)

    def largest(promise: Tensor | None, rows: int | None) -> int:
        with Largest() as mode:
            stats = project(hidden, weight, targets, CALL, gradient=promise, rows=rows)
            total(stats, gradient).backward()
            measure(hidden, weight, targets, CALL, rows=rows)
        return mode.bytes

    for promise in (None, gradient):
        assert largest(promise, rows=32) == 32 * 512 * 4
        assert largest(promise, rows=256) == 256 * 512 * 4
    with Largest() as mode:
        total(plain(hidden, weight, targets), gradient).backward()
    assert mode.bytes >= 256 * 512 * 4


def test_nothing_waits_for_the_device() -> None:
    """A tensor on the meta device has no values to wait for."""
    hidden, weight, targets, gradient = inputs(torch.float32)
    hidden, weight = (x.detach().to("meta").requires_grad_() for x in (hidden, weight))
    targets, gradient = targets.to("meta"), gradient.to("meta")
    for promise in (None, gradient):
        stats = project(hidden, weight, targets, CALL, gradient=promise, rows=7)
        (gradient * (stats.full - stats.call)).sum().backward()
    assert measure(hidden, weight, targets, CALL).correct.shape == (N,)
