"""The paper's table (arXiv 2602.12005) on a labelled dataset, with one command:

    python experiments/paper.py smoke --dataset labelled-4k --partner smollm2-135m --out paper

trains each objective until as many tokens have had the gradient of their true token, evaluates every run in the same
way, and prints one table over all of them. A command that is done is not run again, an evaluation not on the same
checkpoint, and an interrupted training goes on from its last checkpoint: say the same again to go on.

    smoke   a model of a million parameters on two CPU cores, in less than 40 minutes
    small   334M parameters on one GPU, in about an hour
    paper   334M parameters, 43B tokens learnt; start it under torchrun, see --launcher

What the columns are says docs/evaluation.md. Without a judge (--judge), facts that come out of the cascade stand for
FActScore. Language understanding is measured on --task, and, where there is none, on continuations: which of four
pieces of text follows this one, in documents that no run has seen?
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lacy.cascade.language_model import results_folder
from lacy.trainer.checkpoint import newest

LACY = str(Path(sys.executable).with_name("lacy"))
COMMON = {"holdout": 0.1, "seed": 0}
SIZES: dict[str, dict[str, object]] = {
    "smoke": COMMON | {"model": "tiny", "gt-tokens": 1_500_000, "warmup": 50, "eval-every": 200, "eval-tokens": 20_000},
    "small": COMMON | {"model": "gpt2-334m", "gt-tokens": 80_000_000, "batch": 32, "accumulate": 2, "holdout": 0.01},
    "paper": COMMON | {"model": "gpt2-334m", "gt-tokens": 43_000_000_000, "batch": 32, "holdout": 0.001},
}
PAIRS = {"smoke": 300, "small": 1000, "paper": 2000}  # facts asked for
CONTEXT, PIECE, CHOICES = 64, 16, 4  # of a continuation: tokens before, tokens of a choice, choices
MOST_QUESTIONS = 1000
TRIES, TOLERANCE = 3, 0.005  # until the share called is the same in all runs


def main(
    size: Annotated[str, typer.Argument(help="smoke, small or paper.")],
    dataset: Annotated[Path, typer.Option(help="A folder that lacy label wrote.")],
    out: Annotated[Path, typer.Option(help="Runs, results and the page; the same again goes on.")],
    partner: Annotated[str, typer.Option(help="As for lacy generate.")] = "smollm2-135m",
    objectives: Annotated[str, typer.Option(help="Of lacy train, with commas.")] = "lacy,loss,random,standard",
    budget: Annotated[float, typer.Option(help="Share of the positions that may call, in generation.")] = 0.22,
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="NAME=VALUE", help="Of lacy train, in place of the size's, as batch=16."),
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="Facts asked for, in place of the size's.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Of lacy eval nlu; default: continuations.")] = None,
    entities: Annotated[Path | None, typer.Option(help="For FActScore: a name a line.")] = None,
    knowledge: Annotated[Path | None, typer.Option(help="For FActScore: what facts are checked against.")] = None,
    judge: Annotated[str | None, typer.Option(help="For FActScore: the chat model.")] = None,
    judge_server: Annotated[str | None, typer.Option(help="Its server.")] = None,
    launcher: Annotated[str, typer.Option(help="In front of lacy train: 'torchrun --nproc-per-node 8 -m'.")] = "",
) -> None:
    """Train, evaluate, compare."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size} is none of {', '.join(SIZES)}")
    began = time.monotonic()
    settings = SIZES[size] | dict(_pair(given) for given in train or [])
    asked = ["--pairs", str(pairs or PAIRS[size])]
    held = ["--holdout", str(settings["holdout"])]
    tasks = task or [str(continuations(dataset, float(str(settings["holdout"])), out / "continuations"))]
    runs = [out / objective for objective in objectives.split(",")]
    trainer = [*shlex.split(launcher), "lacy"] if launcher else [LACY]
    for run in runs:
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        step(out, [*trainer, "train", dataset, "--out", run, "--objective", run.name, *flags, "--resume"])
    for run in runs:
        trained = newest(run)
        assert trained is not None, "training ends with a checkpoint"
        of = trained.name
        # <CALL> was never trained: the strongest that such a model can do is to call where it is unsure
        score = "uncertainty" if run.name == "standard" or run.name.startswith("ignore") else "margin"
        calls = ["--partner", partner, "--call-score", score]
        step(out, [LACY, "eval", "delegation", run, "--fit"], of)
        step(out, [LACY, "eval", "leakage", run, *asked], of)
        contain(out, [LACY, "eval", "leakage", run, *asked, *calls], trained, budget)
        step(out, [LACY, "eval", "nlu", run, *(word for name in tasks for word in ("--task", name))], of)
        if entities and knowledge and judge:
            server = ["--judge-server", judge_server] if judge_server else []
            about = ["--entities", entities, "--knowledge", knowledge, "--judge", judge, *server]
            step(out, [LACY, "eval", "factscore", run, *about, *calls, "--budget", str(budget)], of)
    alone = as_run(partner, out / "partner")
    if alone:
        documents = ["--dataset", dataset, *held, "--documents", "held-out"]
        step(out, [LACY, "eval", "leakage", alone, *asked, *documents])
    print(flush=True)
    table = [LACY, "compare", *runs, "--page", out / "compare.html"]
    subprocess.run([str(word) for word in table], check=True)
    if alone:
        contained = json.loads((alone / "eval" / "leakage.json").read_text())["figures"]["contained"]
        print(f"the partner alone, on the held-out documents: {contained:.1%} contained")
    print(f"{(time.monotonic() - began) / 60:.0f} minutes, of this start alone")


def contain(out: Path, command: list[object], trained: Path, budget: float) -> None:
    """Containment where `budget` of the positions called, so that runs compare: texts as short as these miss a budget
    by some points, and are then written anew with another one. One that was tried before stays.
    """
    aim = budget
    for _ in range(TRIES):
        step(out, [*command, "--budget", f"{aim:.4f}"], trained.name)
        result = json.loads((results_folder(trained) / "containment.json").read_text())
        missing = budget - result["figures"]["called"]
        if abs(missing) <= TOLERANCE or result["options"]["budget"] != round(aim, 4):
            return
        aim = min(max(aim + missing, 0.0), 1.0)


def _pair(given: str) -> tuple[str, object]:
    name, equals, value = given.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"{given} is not NAME=VALUE", param_hint="--train")
    return name.replace("_", "-"), value


def step(out: Path, command: list[object], of: str = "") -> None:
    """Run a command, unless it was done before, on the checkpoint `of` where it is of one."""
    words = [str(word) for word in command]
    shown = shlex.join(["lacy" if word == LACY else word for word in words])
    done = out / "done.jsonl"
    lines = map(json.loads, done.read_text().splitlines()) if done.exists() else []
    if any((line["command"], line["of"]) == (shown, of) for line in lines):
        print(f"== {shown}\n   done before", flush=True)
        return
    print(f"== {shown}", flush=True)
    began = time.monotonic()
    if subprocess.run(words).returncode:
        sys.exit(f"stopped at: {shown}\nthe same command goes on from here")
    out.mkdir(parents=True, exist_ok=True)
    with open(done, "a") as file:
        file.write(json.dumps({"command": shown, "of": of, "seconds": round(time.monotonic() - began)}) + "\n")


def as_run(partner: str, folder: Path) -> Path | None:
    """A folder with the partner's files, whose results are its own; None for a server or a hub name."""
    from lacy.labelers.llm.model_folders import resolve

    if partner == "none" or "://" in partner or not Path(resolve(partner)).is_dir():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(resolve(partner)).absolute().iterdir():
        if file.is_file() and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    return folder


def continuations(dataset: Path, holdout: float, folder: Path) -> Path:
    """A task of lm-evaluation-harness from the held-out documents: which piece of text comes next?"""
    from lacy.schemas.files import write_atomic
    from lacy.schemas.manifest import signals_path
    from lacy.trainer import shards

    if (folder / "continuation.yaml").exists():
        return folder / "continuation.yaml"
    import pyarrow.parquet as pq

    labels = shards.open_labels(str(dataset), None)
    found: list[tuple[str, str]] = []
    for record in labels.records:
        with pq.ParquetFile(signals_path(labels.root, record.name)) as file:
            rows = np.flatnonzero(shards.is_held(file, holdout))
            table = file.read(["text", "token_starts"]).take(rows)
        for text, starts in zip(table["text"].to_pylist(), table["token_starts"].to_pylist(), strict=True):
            for first in range(0, len(starts) - CONTEXT - PIECE, CONTEXT + PIECE):
                at, end = starts[first + CONTEXT], starts[first + CONTEXT + PIECE]
                found.append((text[starts[first] : at], text[at:end]))
    rng = np.random.default_rng(0)
    found = [found[place] for place in rng.permutation(len(found))[:MOST_QUESTIONS]]
    lines = []
    for place, (before, piece) in enumerate(found):
        others = rng.choice(np.delete(np.arange(len(found)), place), CHOICES - 1, replace=False)
        label = int(rng.integers(CHOICES))
        choices = [found[other][1] for other in others]
        choices.insert(label, piece)
        lines.append(json.dumps({"context": before, "choices": choices, "label": label}))
    write_atomic(folder / "continuation.jsonl", "".join(line + "\n" for line in lines).encode())
    write_atomic(
        folder / "continuation.yaml",
        b"task: continuation\n"
        b"dataset_path: json\n"
        b"dataset_kwargs:\n  data_files: {test: continuation.jsonl}\n"
        b"test_split: test\n"
        b"output_type: multiple_choice\n"
        b'doc_to_text: "{{context}}"\n'
        b"doc_to_choice: choices\n"
        b"doc_to_target: label\n"
        b'target_delimiter: ""\n'
        b"metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    )
    return folder / "continuation.yaml"


if __name__ == "__main__":
    typer.run(main)
