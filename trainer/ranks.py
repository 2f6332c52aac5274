"""The processes of one run, as started by `torchrun`; a single one without it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lacy.schemas.errors import TrainingError
from lacy.trainer.config import TrainConfig


@dataclass(frozen=True)
class Ranks:
    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def joined(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A function that gathers (n,) of each rank into (ranks * n,), in order of rank; None for a single rank."""
        return _joined if self.count > 1 else None

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place and on the tensor's own device; each rank gets the sum."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, value: Any) -> list[Any]:
        """Gather a small object from every rank, in order of rank; each rank gets all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join(config: TrainConfig) -> Ranks:
    """Join the other ranks. Raises TrainingError when there is no such device."""
    count, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise TrainingError(
            "--device cuda: torch sees no GPU here (leave the option out to train on the CPU)", usage=True
        )
    if config.device == "cpu" or not has_gpu:
        device = torch.device("cpu")
    else:
        if local >= torch.cuda.device_count():
            raise TrainingError(f"{local + 1} ranks on a machine with {torch.cuda.device_count()} GPUs: start fewer")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if count > 1:
        # gloo beside nccl: counts that the host knows are summed there, without waiting for the device.
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    return Ranks(rank=int(os.environ.get("RANK", 0)), count=count, device=device)


def _joined(values: torch.Tensor) -> torch.Tensor:
    pieces = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, values.contiguous())
    return torch.cat(pieces)
