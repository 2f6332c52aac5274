"""When the small model calls: the scores of a position, and thresholds on them.

With z the logits at a position and lse the logsumexp of all but <CALL>'s, in float32:

    margin       z[CALL] - lse: the logit of p(<CALL>), which ranks like the probability but never saturates
    uncertainty  1 - the highest probability of the softmax without <CALL>
    combined     margin + weight * uncertainty, the weight fitted on held-out tokens (`lacy eval delegation --fit`)

A call is made where the score is above a fixed threshold, or among the highest of the text so far, which keeps to a
*budget*, a share of the positions (`Quantile`).
"""

import json
from collections import deque
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lacy.cascade.options import CallScore
from lacy.schemas.errors import CascadeError
from lacy.schemas.files import write_atomic

CALL_SCORES: Final = get_args(CallScore)
WINDOW: Final = 32  # scores that a running quantile remembers
LEND, PAY = 16, 8  # positions over which it makes up for too many calls, and for too few
FITTED: Final = "call.json"  # in a checkpoint's folder


class Scores(NamedTuple):
    """(N,) float32 each, on the CPU."""

    margin: np.ndarray
    uncertainty: np.ndarray

    def of(self, kind: CallScore, weight: float = 0.0) -> np.ndarray:
        """(N,) float32: the score that decides calls; `weight` is used by "combined"."""
        if kind == "combined":
            return self.margin + np.float32(weight) * self.uncertainty
        return self.margin if kind == "margin" else self.uncertainty


class Fitted(BaseModel):
    """The fitted weight of the combined score: `call.json` in a checkpoint's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    weight: float
    tokens: int  # held-out tokens that it was fitted on


class Quantile:
    """A running quantile over a text's own scores that keeps to a budget: the share of positions that call.

    A score is compared with the last WINDOW scores of the same text, so no text depends on another. The scores of its
    prompt, `seen`, are the warm-up. If g of n such scores are higher than this one (equal ones count half), and c of
    the m positions so far called, a call is made where

        g / (n + 1) < budget + owed / h,    owed = budget * m - c,    h = LEND if owed < 0, else PAY

    The last term pays back: if scores drift, or have few distinct values, a plain quantile calls too often or too
    rarely. Several calls in a row, as for the tokens of a name, are possible before the term stops them. A budget of 0
    never calls, one of 1 always.
    """

    def __init__(self, budget: float, seen: np.ndarray):
        self._budget = budget
        self._seen = deque(np.asarray(seen, np.float32).tolist(), maxlen=WINDOW)
        self._made = self._called = 0

    def decide(self, score: float, may: bool = True) -> bool:
        """Whether to call at the next position, given its score; never if not `may`, which is paid back later."""
        score = float(score)
        higher = sum(seen > score for seen in self._seen) + sum(seen == score for seen in self._seen) / 2
        owed = self._budget * self._made - self._called
        level = self._budget + owed / (LEND if owed < 0 else PAY)
        call = may and self._budget > 0 and (self._budget == 1 or higher / (len(self._seen) + 1) < level)
        self._seen.append(score)
        self._made += 1
        self._called += call
        return call


class Fixed:
    """A fixed threshold: a call is made where the score is above it."""

    def __init__(self, threshold: float):
        self._threshold = threshold

    def decide(self, score: float, may: bool = True) -> bool:
        """As `Quantile.decide`."""
        return may and score > self._threshold


def scores(logits: torch.Tensor, call_id: int | None) -> Scores:
    """The scores of N positions from their logits (N, V); without <CALL> in the vocabulary every margin is -inf."""
    logits = logits.float()
    words = forbid(logits, call_id)
    lse = words.logsumexp(-1)
    margin = torch.full_like(lse, -torch.inf) if call_id is None else logits[..., call_id] - lse
    uncertainty = 1 - (words.amax(-1) - lse).exp()
    return Scores(margin.cpu().numpy(), uncertainty.cpu().numpy())


def forbid(logits: torch.Tensor, *ids: int | None) -> torch.Tensor:
    """A copy of the logits (..., V) with -inf at some ids."""
    forbidden = [index for index in ids if index is not None]
    return logits.index_fill(-1, torch.tensor(forbidden, device=logits.device), -torch.inf) if forbidden else logits


def read_fitted(checkpoint: Path) -> Fitted | None:
    """The result of `lacy eval delegation --fit` for a checkpoint, or None. Raises CascadeError for a damaged file."""
    path = checkpoint / FITTED
    try:
        return Fitted.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise CascadeError(f"{path} cannot be read: write it again with lacy eval delegation --fit") from None


def write_fitted(checkpoint: Path, fitted: Fitted) -> None:
    write_atomic(checkpoint / FITTED, (json.dumps(fitted.model_dump(), indent=1) + "\n").encode())
