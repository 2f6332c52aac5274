"""Validation on held-out documents: the losses of the model, and how well p(<CALL>) predicts its errors."""

from collections.abc import Iterable

import numpy as np
import torch
from pydantic import BaseModel
from sklearn.metrics import roc_auc_score
from torch import nn

from lacy.trainer.ranks import Ranks


class Validation(BaseModel):
    """Figures of the held-out tokens. Losses are in nats, over the softmax without <CALL>."""

    tokens: int
    nll_factual: float | None  # mean
    nll_other: float | None  # mean of the tokens that are not factual
    correct: float  # share of tokens that are the most likely one other than <CALL>
    auc_factual_wrong: float | None  # area under the ROC curve of p(<CALL>) for factual tokens predicted wrongly
    auc_factual: float | None  # the same for all factual tokens


@torch.no_grad()
def validate(learner: nn.Module, batches: Iterable[dict[str, torch.Tensor]], ranks: Ranks) -> Validation:
    """Validate on this rank's batches of `lacy.trainer.data.held_out`, with "factual". Every rank must call it."""
    columns: list[list[np.ndarray]] = [[], [], [], []]
    training = learner.training
    learner.eval()
    for batch in batches:
        moved = {name: values.to(ranks.device, non_blocking=True) for name, values in batch.items()}
        stats = learner(moved["ids"], moved.get("positions"), measure=True)
        real = moved["real"].flatten()
        for column, values in zip(
            columns,
            (stats.lse - stats.target, stats.call - stats.lse, stats.correct, moved["factual"].flatten()),
            strict=True,
        ):
            column.append(values[real].cpu().numpy())
    learner.train(training)
    own = [np.concatenate(column) if column else np.zeros(0) for column in columns]
    nll, margin, correct, factual = (np.concatenate(column) for column in zip(*ranks.gathered(own), strict=True))
    factual, correct = factual.astype(bool), correct.astype(bool)
    return Validation(
        tokens=len(nll),
        nll_factual=_mean(nll[factual]),
        nll_other=_mean(nll[~factual]),
        correct=float(correct.mean()),
        auc_factual_wrong=_auc(margin, factual & ~correct),
        auc_factual=_auc(margin, factual),
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None


def _auc(score: np.ndarray, wanted: np.ndarray) -> float | None:
    """Area under the ROC curve. `score` is a float32 margin, since probabilities saturate to a few values."""
    if not np.isfinite(score).all() or wanted.all() or not wanted.any():
        return None
    return float(roc_auc_score(wanted, score))
