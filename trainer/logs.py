"""The log of a run: OUT/log.jsonl, TensorBoard, Weights & Biases."""

import json
import math
from pathlib import Path
from typing import Any

from lacy.schemas.errors import TrainingError
from lacy.schemas.files import sha256, write_atomic
from lacy.trainer.config import TrainConfig


class Log:
    """Writer of one JSON object for each line. Records of steps have "loss", those of validations "nll_other"."""

    def __init__(self, config: TrainConfig, step: int):
        """Open the log of a run that continues after `step`. Later records are removed."""
        path = config.out / "log.jsonl"
        _cut(path, step)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed by close()
        self._board = _board(config.out, step) if config.tensorboard else None
        self._wandb = _wandb(config) if config.wandb else None

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        prefix = "train" if "loss" in record else "valid"
        numbers = {
            f"{prefix}/{name}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
        }
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(out: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _cut(path: Path, step: int) -> None:
    """Remove the records after a step, and any line that a crash truncated."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())


def _board(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("TensorBoard is not installed: pip install tensorboard, or --no-tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)


def _wandb(config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError:
        raise TrainingError("--wandb needs its package: pip install wandb") from None
    settings = config.model_dump(mode="json")
    identity = sha256(str(config.out.absolute()).encode())[:16]
    return wandb.init(project=config.wandb, name=config.out.name, id=identity, resume="allow", config=settings)
