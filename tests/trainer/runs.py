"""Training runs in processes of their own, that can be killed; torch and transformers are imported once for all."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["trainer.train", "torchdata.stateful_dataloader", "torch.utils.tensorboard"])

TIMES = ("tokens_per_second", "memory", "mfu")  # what differs between two equal runs


def start(config: TrainConfig, ranks: int = 1) -> list[Any]:
    """The processes of a run, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_context.Process(target=_run, args=(config, rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def run(config: TrainConfig, ranks: int = 1) -> None:
    for process in start(config, ranks):
        process.join(120)
        assert process.exitcode == 0


def killed(config: TrainConfig, step: int, ranks: int = 1) -> None:
    """Run until `step` is in the log, and kill all processes then and there."""
    processes = start(config, ranks)
    deadline = time.monotonic() + 120
    while not any(record["step"] >= step for record in log(config)):
        assert time.monotonic() < deadline and processes[0].is_alive(), "ended before it could be killed"
        time.sleep(0.002)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(30)


def log(config: TrainConfig, times: bool = False) -> list[dict[str, Any]]:
    """The records of a run, without those figures that differ between two equal runs."""
    path = config.out / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in record.items() if times or name not in TIMES} for record in records]


def last(config: TrainConfig) -> Path:
    return sorted((config.out / "checkpoints").glob("step-*"))[-1]


def state(config: TrainConfig) -> dict[str, bytes]:
    """All that the newest checkpoint holds, by file."""
    folder = last(config)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _run(config: TrainConfig, rank: int, ranks: int, port: int) -> None:
    if ranks > 1:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in given.items()}
    from trainer.train import train

    train(config)
