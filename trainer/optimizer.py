"""AdamW and the schedule of the learning rate."""

import math
from typing import Any

import torch
from torch import nn

from lacy.trainer.config import TrainConfig

DEFAULT_WARMUP = 200  # steps


def build(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build a fused AdamW. Weight decay applies to matrices, not to vectors (biases, norms)."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)


def rate(config: TrainConfig, peak: float, step: int, progress: float, steps: int | None) -> float:
    """The learning rate of step `step` (from 0).

    Args:
        progress: share of the run that is done, 0 to 1, by the nearest limit.
        steps: steps of the whole run, where they are known.

    After a linear warm-up, `cosine` follows half a cosine from the peak to min_lr; `wsd` (warm-up, stable, decay; arXiv
    2404.06395) stays at the peak and falls linearly to min_lr over the last `decay` of the run.
    """
    warmup = config.warmup
    if warmup is None:
        warmup = DEFAULT_WARMUP if steps is None else min(DEFAULT_WARMUP, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    low = peak * config.min_lr
    if config.schedule == "wsd":
        return low + (peak - low) * min(1.0, (1 - progress) / config.decay)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
