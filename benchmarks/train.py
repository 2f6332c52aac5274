"""What a training step costs beside a plain loop: ratios measured in one run, each side in processes of its own.

    python benchmarks/train.py [--model tiny] [--context 1024] [--vocabulary 32768] [--steps N] [--rounds N]

vs_plain_loop         tokens/s of `lacy train --objective standard` over those of a loop as in nanoGPT: same network,
                      batch, precision, compile setting; all logits at once, F.cross_entropy, fused AdamW, clipping
lacy_vs_standard      tokens/s with --objective lacy over those with standard
memory_vs_plain_loop  peak memory of the process with lacy (on a GPU: of the device) over the plain loop's
loader_vs_model       tokens/s of the loader alone over those of the model with lacy

The text is random words of a Zipf distribution, made here; no figure depends on what they say. Rates are medians over
steps and rounds; the rounds alternate between the sides. On a CPU each side has one thread, by default: two that wait
for each other on a busy machine measure the machine. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.datasets import make

SIDES = ("plain", "standard", "lacy")
WARMUP = 1  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=[*SIDES, "loader"], help=argparse.SUPPRESS)
    parser.add_argument("--dataset", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        made = {"vocabulary": options.vocabulary, "parts": 8, "documents": 800, "length": (100, 500)}
        options.dataset = make(Path(folder) / "dataset", **made)
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES:
                found[side].append(run(side, options))
                print(f"round {number + 1}, {side}: {told(found[side][-1])}", flush=True)
        loader = run("loader", options)
        print(f"loader: {loader['rate']:,.0f} tokens/s", flush=True)
    rates = {side: statistics.median(entry["rate"] for entry in entries) for side, entries in found.items()}
    memory = {side: statistics.median(entry["memory"] for entry in entries) for side, entries in found.items()}
    result = {
        "vs_plain_loop": rates["standard"] / rates["plain"],
        "lacy_vs_standard": rates["lacy"] / rates["standard"],
        "memory_vs_plain_loop": memory["lacy"] / memory["plain"],
        "loader_vs_model": loader["rate"] / rates["lacy"],
    }
    mfu = found["lacy"][-1].get("mfu")
    if mfu:
        result["mfu"] = mfu
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


def told(entry: dict[str, float]) -> str:
    mfu = f", MFU {entry['mfu']:.1%}" if entry.get("mfu") else ""
    return f"{entry['rate']:,.0f} tokens/s, {entry['memory'] / 2**30:.2f} GiB{mfu}"


def run(side: str, options: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "context", "batch", "vocabulary", "precision", "compile", "steps", "dataset")
    flags = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    environment = os.environ | {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--side", side, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    return {"plain": plain, "loader": loader_alone}.get(options.side, ours)(options)


def settings(options: argparse.Namespace, out: str, objective: str) -> Any:
    from lacy.trainer.config import TrainConfig

    return TrainConfig(
        dataset=str(options.dataset),
        out=Path(out),
        model=options.model,
        context=options.context,
        batch=options.batch,
        objective=objective,
        precision=options.precision,
        compile=options.compile,
        max_steps=options.steps + WARMUP,
        log_every=1,
        holdout=0,
        tensorboard=False,
    )


def ours(options: argparse.Namespace) -> dict[str, Any]:
    from lacy.trainer.train import train

    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as out:
        memory = Watch()
        config = settings(options, out, options.side)
        train(config, lambda what, told: steps.append(told) if what == "step" else None)
    rates = [step["tokens_per_second"] for step in steps[WARMUP:]]
    return {"rate": statistics.median(rates), "memory": memory.peak(), "mfu": steps[-1]["mfu"]}


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """nanoGPT's loop, on the network that `ours` trains, with the attention of `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM

    from lacy.trainer import model, shards

    with tempfile.TemporaryDirectory() as out:
        config = settings(options, out, "standard")
    labels = shards.open_labels(config.dataset, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = model.precision(config, device) == "bf16"
    network = AutoModelForCausalLM.from_config(model.build(config, labels).config, attn_implementation="sdpa")
    network.to(device).train()
    step_of = network
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        step_of = torch.compile(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = iter(stream(config, labels))
    memory = Watch()
    rates = []
    for _ in range(options.steps + WARMUP):
        began = time.perf_counter()
        ids = next(batches)["ids"].to(device).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = step_of(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)).float(), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        rates.append(ids[:, 1:].numel() / (time.perf_counter() - began))
    return {"rate": statistics.median(rates[WARMUP:]), "memory": memory.peak()}


def loader_alone(options: argparse.Namespace) -> dict[str, Any]:
    from lacy.trainer import shards

    config = settings(options, ".", "lacy")
    batches = iter(stream(config, shards.open_labels(config.dataset, None), "lacy"))
    for _ in range(WARMUP):
        next(batches)
    began, tokens = time.perf_counter(), 0
    while time.perf_counter() - began < 5:
        tokens += next(batches)["ids"][:, 1:].numel()
    return {"rate": tokens / (time.perf_counter() - began), "memory": 0.0}


def stream(config: Any, labels: Any, objective: str = "standard") -> Any:
    from lacy.trainer import data, objectives

    return data.loader(
        labels,
        batch=config.batch,
        context=config.context,
        columns=objectives.columns(objectives.parse(objective)),
        seed=0,
        rank=0,
        ranks=1,
        workers=config.loader_workers,
        holdout=0,
        buffer_tokens=config.buffer_tokens,
        positions=False,
    )


class Watch:
    """Peak memory in bytes: of the device where there is one, else of this process."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        if self._cuda:
            self._cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        if self._cuda:
            return self._cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
