"""Training objectives: at each position the SLM learns the true token, <CALL>, or nothing.

An objective chooses positions. The others learn their true token; the chosen ones get the target <CALL>, or no target
at all where the objective's name begins with "ignore-".

| objective | chooses |
|---|---|
| standard | nothing: plain cross-entropy |
| lacy | factual tokens, the highest current loss of the SLM first, up to the budget (arXiv 2602.12005) |
| lacy-static | what the labels of the dataset delegate; their IGNORE has no target |
| loss | any tokens, highest current loss first |
| rho | the lowest excess loss, current loss - ref_nll, first |
| judge | tokens that the LLM judge marks, highest score first |
| random | in the order of a seeded hash of row and column |

The current loss is that of the softmax without <CALL>, from the forward pass that is trained with. The budget is a
share of all positions, met in each micro-batch over all ranks together. How many positions are chosen depends on the
data alone, so the number of targets of a whole optimizer step is known before its first forward pass:

    objective = parse("lacy")
    counts = count(objective, batch, eos_id)                     # of each micro-batch; summed over ranks
    quotas = [quota(objective, row, budget) for row in counts.tolist()]
    loss, sums = micro_batch(objective, batch, predict, eos_id=eos_id, quota=..., weight=1 / targets_of_the_step)

A batch is a dict of tensors: "ids" (B, T+1) integers, and (B, T), aligned with the targets ids[:, 1:], those of
"label" int8, "factual" bool, "ref_nll" and "judge" float32 that the objective needs. In the stream that it was cut
from, the end token precedes each document.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from lacy.schemas.codes import DELEGATE, IGNORE
from lacy.schemas.hashing import shift, signed, splitmix64
from lacy.trainer.config import LEARN_SOFTMAX, OBJECTIVES
from lacy.trainer.head import Stats

Batch = Mapping[str, Tensor]

_NEEDS: dict[str, frozenset[str]] = {
    "standard": frozenset(),
    "lacy": frozenset({"factual"}),
    "lacy-static": frozenset({"label"}),
    "loss": frozenset(),
    "rho": frozenset({"ref_nll"}),
    "judge": frozenset({"judge"}),
    "random": frozenset(),
}
_BY_CURRENT_LOSS = frozenset({"lacy", "loss", "rho"})
_IGNORE = "ignore-"


@dataclass(frozen=True)
class Objective:
    """Made by `parse`."""

    name: str  # without "ignore-"
    ignore: bool  # the chosen positions have no target

    @property
    def dynamic(self) -> bool:
        """Whether the current loss decides which positions are chosen."""
        return self.name in _BY_CURRENT_LOSS

    @property
    def budgeted(self) -> bool:
        return self.name not in ("standard", "lacy-static")


def parse(text: str) -> Objective:
    """Raises ValueError for a name that is not in OBJECTIVES."""
    if text not in OBJECTIVES:
        raise ValueError(f"unknown objective {text!r}; choose one of {', '.join(OBJECTIVES)}")
    return Objective(text.removeprefix(_IGNORE), text.startswith(_IGNORE))


def columns(objective: Objective) -> set[str]:
    """The columns that a batch needs beside "ids"."""
    return set(_NEEDS[objective.name])


# The number of chosen positions, which follows from the data alone.


def candidates(objective: Objective, batch: Batch, eos_id: int) -> Tensor:
    """(B, T) bool: the positions that may be chosen; for lacy-static those that are.

    Never an end token, nor the first token of a document, which has no text before it.
    """
    inputs, targets = batch["ids"][:, :-1], batch["ids"][:, 1:]
    inside = (inputs != eos_id) & (targets != eos_id)
    match objective.name:
        case "standard":
            return torch.zeros_like(inside)
        case "lacy":
            return inside & batch["factual"]
        case "lacy-static":
            return inside & (batch["label"] == DELEGATE)
        case "rho":
            return inside & ~batch["ref_nll"].isnan()
        case "judge":
            return inside & (batch["judge"] > 0)
    return inside


def ignored(objective: Objective, batch: Batch) -> Tensor:
    """(B, T) bool: the positions that have no target, whatever is chosen."""
    if objective.name == "lacy-static":
        return batch["label"] == IGNORE
    return torch.zeros_like(batch["ids"][:, 1:], dtype=torch.bool)


def count(objective: Objective, batch: Batch, eos_id: int) -> Tensor:
    """(3,) int64: candidates, positions, ignored positions."""
    possible, without = candidates(objective, batch, eos_id), ignored(objective, batch)
    positions = torch.full((), possible.numel(), device=possible.device)
    return torch.stack([possible.sum(), positions, without.sum()])


def quota(objective: Objective, counts: Sequence[int], budget: float) -> int:
    """The number of positions chosen in a micro-batch, given the sum of its `count` over ranks.

    The budget is a share of all positions, rounded to the nearest number (half to even), or fewer where there are not
    as many candidates; it has no effect for standard and lacy-static. Raises ValueError for a budget outside 0 to 1.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"a budget is between 0 and 1, not {budget}")
    possible, positions, _ = counts
    return min(possible, round(budget * positions)) if objective.budgeted else possible


# The choice of positions by their scores.


def score(
    objective: Objective, batch: Batch, nll: Tensor | None = None, *, seed: int = 0, first_row: int = 0
) -> Tensor:
    """(B, T): the scores that rank the candidates of an objective with a budget; the highest are chosen first.

    Args:
        nll: (B, T), the current loss; for dynamic objectives.
        seed: of random.
        first_row: the number of the batch's first row, of all rows of the run, so that random depends neither on
            micro-batches nor on ranks.
    """
    match objective.name, nll:
        case "judge", _:
            return batch["judge"]
        case "random", _:
            rows, length = batch["ids"].shape
            return hashes(seed, first_row, rows, length - 1, batch["ids"].device)
        case "rho", Tensor():
            return batch["ref_nll"] - nll.detach()
        case "lacy" | "loss", Tensor():
            return nll.detach()
    raise ValueError(f"{objective} has nothing to rank by")


def choose(
    possible: Tensor,
    scores: Tensor,
    quota: int,
    *,
    joined: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
) -> Tensor:
    """(B, T) bool: the candidates with the highest scores over all ranks, `quota` of them, which must not be more.

    Of equal scores (float32, or int32) the earlier is chosen: by rank, row and column. NaN is the lowest score.

    Args:
        possible: (B, T) bool, the candidates.
        scores: (B, T).
        joined: an (n,) tensor to those of all ranks, (ranks * n,), in order of rank; None for one rank.
        rank: this one.
    """
    if quota == 0:
        return torch.zeros_like(possible)
    # One integer tells candidates from the others too, whatever their scores: no score has the lowest.
    keys = torch.where(possible, _sortable(scores), torch.iinfo(torch.int32).min).flatten()
    everywhere = joined(keys) if joined else keys
    best = torch.sort(everywhere, descending=True, stable=True).indices[:quota]
    chosen = torch.zeros_like(everywhere, dtype=torch.bool).index_fill_(0, best, True)
    return chosen[rank * len(keys) :][: len(keys)].view_as(possible)


def hashes(seed: int, first_row: int, rows: int, length: int, device: torch.device) -> Tensor:
    """(rows, length) int32: a pseudo-random number >= 0 for each (seed, row, column), the same on all devices.

    The upper 31 bits of splitmix64's mixing function, applied to the seed, then to the sum of that and the row, then to
    the sum of that and the column, modulo 2**64.
    """
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    column = torch.arange(length, device=device)
    start = splitmix64(torch.full((1, 1), signed(seed), device=device))
    return shift(splitmix64(splitmix64(start + row) + column), 33).to(torch.int32)


def _sortable(scores: Tensor) -> Tensor:
    """Scores as int32 in the same order, NaN as -inf; -0.0 equals 0.0. The lowest int32 is never one of them."""
    if scores.dtype == torch.int32:
        return scores
    # float32 is a sign and a magnitude: the bits of negative numbers count downwards.
    bits = (scores.float().nan_to_num(-torch.inf, torch.inf, -torch.inf) + 0.0).view(torch.int32)
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


# The loss.


def losses(stats: Stats, chosen: Tensor, learn_softmax: str = "full") -> Tensor:
    """(N,) nats: the loss of each position if the target of the chosen ones is <CALL>.

    With m = stats.margin, so that p(<CALL>) = sigmoid(m), and nll that of the softmax without <CALL>:

    | learn_softmax | at positions that learn | at chosen ones | |
    |---|---|---|---|
    | full | nll + softplus(m) | softplus(-m) | cross-entropy over all columns |
    | without_call | nll | softplus(-m) | as the paper describes it: nothing pushes <CALL> down |
    | detached | nll + softplus(m) | softplus(-m) | as full, but m moves the logit of <CALL> alone |

    Raises ValueError for another learn_softmax.
    """
    # softplus(x) is -logsigmoid(-x): torch's own softplus is linear from 20.
    if learn_softmax == "full":
        return stats.full - torch.where(chosen, stats.call, stats.target)
    if learn_softmax == "without_call":
        return torch.where(chosen, -functional.logsigmoid(stats.margin), stats.nll)
    if learn_softmax == "detached":
        margin = stats.call - stats.lse.detach()
        return torch.where(chosen, -functional.logsigmoid(margin), stats.nll - functional.logsigmoid(-margin))
    raise ValueError(f"unknown learn_softmax {learn_softmax!r}; choose one of {', '.join(LEARN_SOFTMAX)}")


def micro_batch(
    objective: Objective,
    batch: Batch,
    predict: Callable[[Tensor | None], Stats],
    *,
    eos_id: int,
    quota: int,
    weight: float,
    learn_softmax: str = "full",
    seed: int = 0,
    first_row: int = 0,
    joined: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """The loss of one micro-batch, and sums for the log; nothing waits for the device.

    Args:
        predict: runs the model on the batch and returns `trainer.head.project` of its B * T positions; its argument is
            what `project` may be promised as `gradient`.
        weight: of a position's loss: 1 / the targets of the whole step, and times any constant that the loss is
            multiplied with. Call backward on what is returned, not on a multiple of it.
        eos_id, quota, learn_softmax, seed, first_row, joined, rank: see `candidates`, `choose`, `losses` and `score`.

    Returns:
        The weighted sum of the losses of this rank's positions, and (4,) float64: the sum of the losses of positions
        that learn, their number, and the same of positions whose target is <CALL>.
    """
    possible, without = candidates(objective, batch, eos_id), ignored(objective, batch)

    def chosen_by(nll: Tensor | None) -> Tensor:
        if not objective.budgeted:
            return possible
        scores = score(objective, batch, nll, seed=seed, first_row=first_row)
        return choose(possible, scores, quota, joined=joined, rank=rank)

    def silent(chosen: Tensor | None) -> Tensor:
        return without | chosen if objective.ignore and chosen is not None else without

    # Where the chosen ones keep a target or are known, the weight of each position is known before the forward pass.
    chosen = None if objective.dynamic else chosen_by(None)
    promised = learn_softmax == "full" and not (objective.dynamic and objective.ignore)
    stats = predict(torch.where(silent(chosen), 0.0, weight).flatten() if promised else None)
    if chosen is None:
        chosen = chosen_by(stats.nll.view_as(possible))
    has_target, calls = ~silent(chosen).flatten(), chosen.flatten()
    each = torch.where(has_target, losses(stats, calls, learn_softmax), 0.0)
    told, learns = each.detach().double(), has_target & ~calls
    calls = calls & has_target
    sums = [torch.where(learns, told, 0.0).sum(), learns.sum(), torch.where(calls, told, 0.0).sum(), calls.sum()]
    return (each * weight).sum(), torch.stack([x.double() for x in sums])
