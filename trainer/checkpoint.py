"""Checkpoints: ordinary model folders that `transformers` and vLLM open, plus the state that a resumed run needs.

    RUN/checkpoints/step-00001000/
      config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json
      training/optimizer.safetensors   AdamW's moments: exp_avg.<parameter>, exp_avg_sq.<parameter>
      training/state.json              step, counts, and the random state and data position of each rank

A thread of the first rank writes a checkpoint under a hidden name and renames it when it is complete.
"""

import base64
import json
import os
import shutil
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_utils import PreTrainedModel

from lacy.schemas.errors import TrainingError
from lacy.schemas.files import TEMPORARY, write_atomic
from lacy.trainer.config import TrainConfig
from lacy.trainer.ranks import Ranks

VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """Progress of a run. Tokens are targets; `gt_tokens` are those trained on their true token."""

    step: int = 0
    tokens: int = 0
    gt_tokens: int = 0


@dataclass(frozen=True)
class Snapshot:
    """State of the run, copied to host memory. Only the first rank holds tensors."""

    progress: Progress
    ranks: list[dict[str, Any]]  # "loader" and "random" of each rank
    weights: Tensors
    moments: Tensors


def folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. A folder with its final name is complete."""
    return sorted((out / "checkpoints").glob("step-[0-9]*"))


def newest(out: Path) -> Path | None:
    return next(reversed(checkpoints(out)), None)


def data_of(path: Path) -> dict[str, Any]:
    """What a checkpoint was trained on: "fingerprint" of the labels, "holdout", ...; empty if it cannot be read."""
    try:
        state = json.loads((path / "training" / "state.json").read_bytes())
        return dict(state["ranks"][0]["loader"]["geometry"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def take(
    progress: Progress, loader: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> Snapshot:
    """Copy the state to host memory. Every rank must call it."""
    weights: Tensors = {}
    moments: Tensors = {}
    for name, parameter in network.named_parameters():
        _keep(weights, name, parameter.detach(), ranks)
        for moment in MOMENTS:
            _keep(moments, f"{moment}.{name}", optimizer.state[parameter][moment], ranks)
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    mine = {"loader": loader, "random": _random_state(ranks.device)}
    return Snapshot(progress, ranks.gathered(mine), weights, moments)


def restore(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> tuple[Progress, dict[str, Any]]:
    """Load weights, moments and random state in place. Returns the progress and this rank's position in the data.

    Raises TrainingError for a checkpoint that is damaged or was saved by another number of ranks.
    """
    try:
        state = json.loads((path / "training" / "state.json").read_bytes())
        if state["version"] != VERSION:
            raise TrainingError(
                f"{path} has version {state['version']}; this lacy reads version {VERSION}: resume with the lacy that "
                f"saved it, or start a new run with --model {path}"
            )
        if len(state["ranks"]) != ranks.count:
            raise TrainingError(
                f"{path} was saved by {len(state['ranks'])} ranks, this run has {ranks.count}: resume with as many, "
                f"or begin a new run from its weights with --model {path}"
            )
        progress = Progress(**state["progress"])
        mine = state["ranks"][ranks.rank]
        with (
            safe_open(path / "model.safetensors", "pt") as weights,
            safe_open(path / "training" / "optimizer.safetensors", "pt") as moments,
        ):
            for name, parameter in network.named_parameters():
                _fill(parameter, weights.get_tensor(name))
                entry: Tensors = {"step": torch.tensor(float(progress.step), device=parameter.device)}
                for moment in MOMENTS:
                    entry[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    _fill(entry[moment], moments.get_tensor(f"{moment}.{name}"))
                optimizer.state[parameter] = entry
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"{path} is damaged ({reason}): remove it and resume from the checkpoint before it"
        ) from None
    _set_random_state(mine["random"], ranks.device)
    return progress, mine["loader"]


class Saver:
    """Writes checkpoints in the background, one at a time, and removes old ones as `keep` and `keep_every` say."""

    def __init__(self, config: TrainConfig, network: PreTrainedModel, tokenizer: dict[str, bytes]):
        self._out, self._keep, self._every = config.out, config.keep, config.keep_every
        self._tokenizer = tokenizer
        self._network = network
        self._thread: threading.Thread | None = None
        self._failure: TrainingError | None = None
        for leftover in (self._out / "checkpoints").glob(f".*{TEMPORARY}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write; waits first for the previous checkpoint. Raises as `wait` does."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises TrainingError when it could not be written."""
        self.join()
        if self._failure is not None:
            raise self._failure

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def _run(self, snapshot: Snapshot) -> None:
        target = folder(self._out, snapshot.progress.step)
        temporary = target.with_name(f".{target.name}{TEMPORARY}")
        try:
            self._write(temporary, snapshot)
            os.replace(temporary, target)
            _flush(target.parent)
            self._prune()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
            good = newest(self._out)
            last = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            self._failure = TrainingError(
                f"cannot save {target}: {reason}; {last}: make room, then resume with --resume"
            )

    def _write(self, temporary: Path, snapshot: Snapshot) -> None:
        (temporary / "training").mkdir(parents=True)
        self._network.config.save_pretrained(temporary)
        self._network.generation_config.save_pretrained(temporary)
        for name, content in self._tokenizer.items():
            write_atomic(temporary / name, content)
        weights, moments = temporary / "model.safetensors", temporary / "training" / "optimizer.safetensors"
        save_file(snapshot.weights, weights, metadata={"format": "pt"})
        save_file(snapshot.moments, moments)
        for path in (weights, moments):
            _flush(path)
        state = {"version": VERSION, "progress": asdict(snapshot.progress), "ranks": snapshot.ranks}
        write_atomic(temporary / "training" / "state.json", (json.dumps(state, indent=1) + "\n").encode())

    def _prune(self) -> None:
        for path in checkpoints(self._out)[: -self._keep]:
            step = int(path.name.removeprefix("step-"))
            if self._every is None or step % self._every:
                hidden = path.with_name(f".{path.name}{TEMPORARY}")  # never half a checkpoint under its name
                os.replace(path, hidden)
                shutil.rmtree(hidden, ignore_errors=True)


def whole(value: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that may be sharded over ranks. Every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _keep(tensors: Tensors, name: str, value: torch.Tensor, ranks: Ranks) -> None:
    gathered = whole(value)
    if ranks.first:
        tensors[name] = gathered.to("cpu", copy=True).contiguous()


@torch.no_grad()
def _fill(target: torch.Tensor, value: torch.Tensor) -> None:
    if target.shape != value.shape:
        raise ValueError(f"a tensor has shape {tuple(value.shape)}, not {tuple(target.shape)}")
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def _random_state(device: torch.device) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _set_random_state(states: dict[str, str], device: torch.device) -> None:
    tensors = {
        name: torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8) for name, state in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
