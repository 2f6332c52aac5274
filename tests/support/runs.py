"""Training runs in processes of their own, that can be killed; torch and transformers are imported once for all."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any

from lacy.trainer.config import TrainConfig

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lacy.trainer.train", "torchdata.stateful_dataloader", "torch.utils.tensorboard"])

TIMES = ("tokens_per_second", "memory", "mfu")  # what differs between two equal runs


def start(
    config: TrainConfig, ranks: int = 1, told: Any = None, largest_file: int | None = None, deaf: bool = False
) -> list[Any]:
    """The processes of a run, as torchrun would start them; or `deaf`, as a program might that blocks signals."""
    port = _free_port()
    processes = [
        _context.Process(target=_run, args=(config, rank, ranks, port, told, largest_file, deaf))
        for rank in range(ranks)
    ]
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


def fails(config: TrainConfig, ranks: int = 1, largest_file: int | None = None) -> str:
    """The message of the error that ends a run; with `largest_file`, no file may grow larger, in bytes."""
    ours, theirs = _context.Pipe(duplex=False)
    processes = start(config, ranks, theirs, largest_file)
    assert ours.poll(120), "it does not fail"
    for process in processes:
        process.join(60)
    return ours.recv()


def steps(config: TrainConfig, ranks: int) -> None:
    """Train on the same sequences whatever the number of ranks, and write the weights to OUT/weights.pt."""
    port = _free_port()
    processes = [_context.Process(target=_steps, args=(config, rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(
    config: TrainConfig, rank: int, ranks: int, port: int, told: Any, largest_file: int | None, deaf: bool
) -> None:
    _as_torchrun_does(rank, ranks, port)
    signal.pthread_sigmask(signal.SIG_BLOCK if deaf else signal.SIG_UNBLOCK, {signal.SIGTERM})
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from lacy.trainer.train import train

    try:
        train(config)
    except Exception as error:
        if told is None:
            raise
        told.send(str(error))


def _steps(config: TrainConfig, rank: int, ranks: int, port: int) -> None:
    _as_torchrun_does(rank, ranks, port)
    import torch

    from lacy.trainer import checkpoint, data, objectives
    from lacy.trainer import train as training

    run = training._prepare(config, training.join(config))
    whole = data.loader(
        run.labels, batch=config.batch * ranks, context=run.context, columns=objectives.columns(run.objective)
    )
    mine = slice(rank * config.batch, (rank + 1) * config.batch)
    progress = checkpoint.Progress()
    for _ in range(config.max_steps or 0):
        batches = [{name: values[mine] for name, values in next(whole).items()} for _ in range(config.accumulate)]
        counts = torch.stack([objectives.count(run.objective, batch, run.labels.eos_id) for batch in batches])
        step = training.Step(batches, counts, {}, 0.0)
        together, _ = training._agree(run, step, training.Stop(), None)
        progress, told = training._step(run, step, together, progress)
    sums = run.ranks.total(told[:4].clone())
    found = {name: checkpoint.whole(value.detach()) for name, value in run.network.named_parameters()}
    if rank == 0:
        config.out.mkdir()
        torch.save(found | {"told": sums, "norm": told[4:]}, config.out / "weights.pt")
    run.ranks.wait()
    run.ranks.leave()


def _as_torchrun_does(rank: int, ranks: int, port: int) -> None:
    if ranks > 1:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in given.items()}
