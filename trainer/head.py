"""The vocabulary projection in chunks of rows: three numbers for each position, never all the logits.

The objectives need of each position

    lse     logsumexp of its logits without <CALL>
    target  the logit of the true token
    call    the logit of <CALL>

and, from these, `full`, the logsumexp of all its logits. The logits of one chunk of rows exist at a time, in two
buffers that the next chunk reuses: of 64K positions and a vocabulary of 32K, all logits would be 8 GiB in float32.

The backward pass computes the logits again, so a training step costs four matrix products of their size. It costs
three, as plain cross-entropy does, where the caller knows the gradient of `full` beforehand, and promises it:

    weight = has_target / positions_in_the_step                  # (N,), times all other factors of the loss
    stats = project(hidden, embedding, targets, call_id, gradient=weight)
    (weight * torch.where(delegated, stats.full - stats.call, stats.full - stats.target)).sum().backward()

Both losses have the same gradient in `full`, so `delegated` may be chosen by the losses of this very forward pass. What
was promised must arrive: the factor of a loss that is scaled (the number of ranks, where gradients are averaged over
them, or that of a gradient scaler) belongs in the weights.

Products run in the dtype that autocast gives, the softmax and the sums over chunks in float32 (float64 for float64).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of a chunk: rows at most, and bytes of its logits in float32. Measured on CPU; on a GPU products want more rows.
CHUNK = {"cpu": (1024, 1 << 26), "cuda": (8192, 1 << 29)}
_PROMISE_TOLERANCE = 1e-3


class Stats(NamedTuple):
    """What the objectives need of each position: (N,) float32 each, or float64 for float64 inputs."""

    lse: Tensor  # logsumexp of the logits without <CALL>; without a gradient where that of `full` was promised
    target: Tensor  # logit of the true token
    call: Tensor  # logit of <CALL>
    full: Tensor  # logsumexp of all logits

    @property
    def nll(self) -> Tensor:
        """(N,) nats: the true token's negative log-likelihood in the softmax without <CALL>."""
        return self.lse - self.target

    @property
    def margin(self) -> Tensor:
        """(N,): m, of which p(<CALL>) is the sigmoid."""
        return self.call - self.lse


class Measures(NamedTuple):
    """What validation needs of each position: (N,) as in `Stats`, and (N,) bool."""

    lse: Tensor
    target: Tensor
    call: Tensor
    top: Tensor  # highest logit other than that of <CALL>
    correct: Tensor  # whether it is the true token's


def project(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    call_id: int,
    *,
    gradient: Tensor | None = None,
    rows: int | None = None,
) -> Stats:
    """The statistics of each position's logits `hidden @ weight.T`, differentiable in hidden and weight.

    Args:
        hidden: (N, d) floats.
        weight: (V, d) floats; may be the token embedding. Each row is a column of the softmax, padding too.
        targets: (N,) int64 in [0, V).
        call_id: the row of <CALL>.
        gradient: (N,) or scalar; a promise of the gradient that will arrive at `full`, which saves a quarter of the
            work. `lse` then has no gradient.
        rows: of a chunk; by default what suits the device.

    Raises:
        RuntimeError: in the backward pass, where another gradient arrives at `full` than was promised (on CUDA as a
            device-side assertion), or where the promised gradients were already used by an earlier backward pass.
    """
    rows = rows or chunk_rows(len(weight), hidden.device)
    dtype = _compute_dtype(hidden, weight)
    if gradient is None or not torch.is_grad_enabled():
        lse, target, call = _Recomputed.apply(hidden, weight, targets, call_id, rows, dtype)
        return Stats(lse, target, call, torch.logaddexp(lse, call))
    gradient = gradient.detach().to(_stats_dtype(dtype)).expand(len(targets))
    return Stats(*_Promised.apply(hidden, weight, targets, call_id, rows, dtype, gradient))


@torch.no_grad()
def measure(hidden: Tensor, weight: Tensor, targets: Tensor, call_id: int, *, rows: int | None = None) -> Measures:
    """As `project`, without gradients, and what the model would write: how likely it is, and whether it is true."""
    rows = rows or chunk_rows(len(weight), hidden.device)
    dtype = _compute_dtype(hidden, weight)
    lse, target, call = _empty_stats(len(targets), dtype, hidden.device)
    top = torch.empty_like(lse)
    correct = torch.empty_like(targets, dtype=torch.bool)
    for chunk in _walk(hidden, weight.to(dtype), targets, call_id, rows):
        at = chunk.at
        lse[at], target[at], call[at] = chunk.lse, chunk.target, chunk.call
        highest = chunk.logits.max(1)
        top[at], correct[at] = highest.values, highest.indices == targets[at]
    return Measures(lse, target, call, top, correct)


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows of a chunk that suit the device: enough for the speed of its products, in bounded memory."""
    most, chunk_bytes = CHUNK["cpu" if device.type == "cpu" else "cuda"]
    return max(64, min(most, chunk_bytes // (4 * vocab)))


class _Chunk(NamedTuple):
    at: slice
    hidden: Tensor  # (n, d) in the products' dtype
    logits: Tensor  # (n, V) in the products' dtype, -inf at <CALL>; a buffer that may be written to
    softmax: Tensor  # (n, V) without <CALL>; a buffer, as above
    lse: Tensor  # (n,), as the next two
    target: Tensor
    call: Tensor


def _walk(hidden: Tensor, weight: Tensor, targets: Tensor, call_id: int, rows: int) -> Iterator[_Chunk]:
    """Chunks of up to `rows` rows, in buffers of which each chunk overwrites the last one's."""
    dtype = weight.dtype
    shape = min(rows, len(hidden)), len(weight)
    all_logits = torch.empty(shape, dtype=dtype, device=hidden.device)
    all_softmax = torch.empty(shape, dtype=_stats_dtype(dtype), device=hidden.device)
    for at in _slices(len(hidden), rows):
        part = hidden[at].to(dtype)
        logits, softmax = all_logits[: len(part)], all_softmax[: len(part)]
        torch.mm(part, weight.T, out=logits)
        target = logits.gather(1, targets[at, None]).squeeze(1).to(softmax.dtype)
        call = logits[:, call_id].to(softmax.dtype, copy=True)
        logits[:, call_id] = -torch.inf
        torch.softmax(logits, 1, dtype=softmax.dtype, out=softmax)
        # The highest probability is at least 1 / V, so its logarithm is exact where that of another might not be.
        lse = logits.amax(1).to(softmax.dtype) - softmax.amax(1).log()
        yield _Chunk(at, part, logits, softmax, lse, target, call)


class _Recomputed(torch.autograd.Function):
    """(lse, target, call), for any gradients of the three; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, call_id: int, rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        lse, target, call = _empty_stats(len(targets), dtype, hidden.device)
        for chunk in _walk(hidden, weight.to(dtype), targets, call_id, rows):
            at = chunk.at
            lse[at], target[at], call[at] = chunk.lse, chunk.target, chunk.call
        ctx.save_for_backward(hidden, weight, targets)
        ctx.call_id, ctx.rows, ctx.dtype = call_id, rows, dtype
        return lse, target, call

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor, grad_target: Tensor, grad_call: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        weight = weight.to(ctx.dtype)
        grads = _Gradients(ctx, hidden, weight)
        for chunk in _walk(hidden, weight, targets, ctx.call_id, ctx.rows):
            at, column = chunk.at, targets[chunk.at, None]
            factor = grad_lse[at, None]
            at_target = factor * chunk.softmax.gather(1, column) + grad_target[at, None]
            grad_logits = torch.mul(chunk.softmax, factor, out=chunk.logits)
            grad_logits.scatter_(1, column, at_target.to(grad_logits.dtype))
            grad_logits[:, ctx.call_id] += grad_call[at]
            grads.add(at, grad_logits, chunk.hidden, weight)
        return *grads.result(ctx.saved_tensors), None, None, None, None


class _Promised(torch.autograd.Function):
    """(lse, target, call, full), where the gradient of `full` is known.

    The forward pass computes what all columns but the target's and that of <CALL> contribute to the gradients. The
    backward pass adds these two, which the objective decides about, in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        call_id: int,
        rows: int,
        dtype: torch.dtype,
        gradient: Tensor,
    ) -> tuple[Tensor, ...]:
        lse, target, call = _empty_stats(len(targets), dtype, hidden.device)
        full = torch.empty_like(lse)
        product_weight = weight.to(dtype)
        grads = _Gradients(ctx, hidden, product_weight)
        for chunk in _walk(hidden, product_weight, targets, call_id, rows):
            at = chunk.at
            lse[at], target[at], call[at] = chunk.lse, chunk.target, chunk.call
            full[at] = torch.logaddexp(chunk.lse, chunk.call)
            factor = gradient[at] * (chunk.lse - full[at]).exp()
            grad_logits = torch.mul(chunk.softmax, factor[:, None], out=chunk.logits)
            grad_logits.scatter_(1, targets[at, None], 0)
            grads.add(at, grad_logits, chunk.hidden, product_weight)
        ctx.grads, ctx.call_id, ctx.rows = grads, call_id, rows
        ctx.save_for_backward(hidden, weight, targets, gradient, target, call, full)
        ctx.mark_non_differentiable(lse)
        return lse, target, call, full

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: Tensor, grad_target: Tensor, grad_call: Tensor, grad_full: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, gradient, target, call, full = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("gradients that were promised to `project` serve one backward pass")
        torch._assert_async(
            (grad_full - gradient).abs().sum() <= _PROMISE_TOLERANCE * gradient.abs().sum(),
            "the gradient of `full` is not the one that `project` was promised",
        )
        at_target = grad_full * (target - full).exp().masked_fill(targets == ctx.call_id, 0) + grad_target
        at_call = grad_full * (call - full).exp() + grad_call
        for at in _slices(len(hidden), ctx.rows):
            grads.add_columns(at, hidden[at], weight, targets[at], at_target[at, None])
            grads.add_column(at, hidden[at], weight, ctx.call_id, at_call[at, None])
        return *grads.result((hidden, weight)), None, None, None, None, None


class _Gradients:
    """Gradients of hidden, (N, d) in the products' dtype, and of weight, (V, d) in float32, where they are needed."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor) -> None:
        """`weight` is in the products' dtype, with which the gradient of hidden starts."""
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        exact = _stats_dtype(weight.dtype)
        self.hidden = torch.empty_like(hidden, dtype=weight.dtype) if need_hidden else None
        self.weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        self.buffer = torch.empty_like(weight) if need_weight and weight.dtype != exact else None

    def add(self, at: slice, grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """A chunk's logits, dense: grad_logits (n, V), hidden (n, d) and weight (V, d) of one dtype."""
        if self.hidden is not None:
            torch.mm(grad_logits, weight, out=self.hidden[at])
        if self.buffer is not None and self.weight is not None:
            self.weight.add_(torch.mm(grad_logits.T, hidden, out=self.buffer))
        elif self.weight is not None:
            self.weight.addmm_(grad_logits.T, hidden)

    def add_columns(self, at: slice, hidden: Tensor, weight: Tensor, columns: Tensor, grad: Tensor) -> None:
        """One logit of each row, in the column (n,), with the gradient (n, 1)."""
        if self.hidden is not None:
            self.hidden[at] += grad * weight[columns]
        if self.weight is not None:
            self.weight.index_add_(0, columns, (grad * hidden).to(self.weight.dtype))

    def add_column(self, at: slice, hidden: Tensor, weight: Tensor, column: int, grad: Tensor) -> None:
        """The same column of each row, with the gradient (n, 1)."""
        if self.hidden is not None:
            self.hidden[at] += grad * weight[column]
        if self.weight is not None:
            self.weight[column] += (grad * hidden).sum(0)

    def result(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        """The gradients in the dtypes of the inputs hidden and weight; None where not needed."""
        hidden, weight, *_ = inputs
        return (
            None if self.hidden is None else self.hidden.to(hidden.dtype),
            None if self.weight is None else self.weight.to(weight.dtype),
        )


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def _stats_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_stats(n: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.empty(n, dtype=_stats_dtype(dtype), device=device) for _ in range(3)]


def _slices(n: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, n, rows))
