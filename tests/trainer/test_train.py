"""Whole runs: killed and resumed, on several ranks, ended by signals and limits, refused."""

import json
import os
import random
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import runs
from tests.trainer.datasets import make
from trainer.config import TrainConfig, TrainingError
from trainer.train import train

STEPS = 14


def configured(dataset, model, out, **options):
    given = {
        "model": str(model), "batch": 2, "context": 32, "max_steps": STEPS, "save_every": 3, "log_every": 1,
        "eval_every": 5, "holdout": 0.1, "buffer_tokens": 500, "loader_workers": 0, "tensorboard": False,
    }  # fmt: skip
    return TrainConfig(dataset=str(dataset), out=out, **(given | options))


@pytest.mark.parametrize("ranks, workers", [(1, 0), (1, 2), (2, 0)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, dataset, small_gpt2, ranks, workers):
    """The model has dropout, so the random state counts too."""
    whole = configured(dataset, small_gpt2, tmp_path / "whole", loader_workers=workers)
    runs.run(whole, ranks)
    broken = whole.model_copy(update={"out": tmp_path / "broken"})
    for step in sorted(random.Random(ranks + workers).sample(range(1, STEPS), 3)):
        runs.killed(broken, step, ranks)
    runs.run(broken, ranks)
    assert [record["step"] for record in runs.log(whole) if "loss" in record] == list(range(1, STEPS + 1))
    assert runs.log(broken) == runs.log(whole)
    assert runs.state(broken) == runs.state(whole)


def test_two_ranks_equal_one(tmp_path, dataset, small_gpt2):
    pass


def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path, dataset, small_gpt2):
    config = configured(dataset, small_gpt2, tmp_path / "run", max_steps=100_000, save_every=100_000)
    (process,) = runs.start(config)
    while len(runs.log(config)) < 3:
        assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
    step = int(runs.last(config).name.removeprefix("step-"))
    assert step == max(record["step"] for record in runs.log(config)) >= 3


@pytest.mark.parametrize("limit", [{"gt_tokens": 300}, {"epochs": 0.1}, {"max_steps": 4, "gt_tokens": 10_000}])
def test_limits(tmp_path, dataset, small_gpt2, limit):
    outcome = train(configured(dataset, small_gpt2, tmp_path / "run", **({"max_steps": None} | limit)))
    progress = outcome.progress
    assert progress.tokens == progress.step * 2 * 32
    learnt = [
        record["gt_tokens"]
        for record in runs.log(configured(dataset, small_gpt2, tmp_path / "run"))
        if "loss" in record
    ]
    if "epochs" in limit:
        assert progress.step == 6
    elif limit.get("max_steps"):
        assert progress.step == 4
    else:
        assert learnt[-2] < 300 <= learnt[-1] == progress.gt_tokens


def test_checkpoints_that_are_kept(tmp_path, dataset, small_gpt2):
    train(configured(dataset, small_gpt2, tmp_path / "run", max_steps=13, save_every=2, keep=2, keep_every=4))
    kept = [int(path.name[-8:]) for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert kept == [4, 8, 12, 13]


def test_a_finished_run_has_nothing_to_do(tmp_path, dataset, small_gpt2):
    config = configured(dataset, small_gpt2, tmp_path / "run", max_steps=3)
    train(config)
    before = runs.state(config)
    assert train(config).progress.step == 3
    assert runs.state(config) == before


def test_a_resumed_run_may_be_longer(tmp_path, dataset, small_gpt2):
    schedule = {"schedule": "constant", "warmup": 2, "eval_every": 100}
    whole = configured(dataset, small_gpt2, tmp_path / "whole", max_steps=8, **schedule)
    train(whole)
    grown = configured(dataset, small_gpt2, tmp_path / "grown", max_steps=4, **schedule)
    train(grown)
    train(grown.model_copy(update={"max_steps": 8}))
    assert runs.state(grown)["model.safetensors"] == runs.state(whole)["model.safetensors"]


def test_a_run_begins_with_the_weights_of_a_checkpoint(tmp_path, dataset, small_gpt2):
    first = configured(dataset, small_gpt2, tmp_path / "first", max_steps=3)
    train(first)
    second = configured(dataset, runs.last(first), tmp_path / "second", max_steps=1, lr=1e-12, weight_decay=0.0)
    train(second)
    before, after = (load_file(runs.last(config) / "model.safetensors") for config in (first, second))
    assert all(torch.allclose(before[name], after[name], atol=1e-8) for name in before)


@pytest.mark.parametrize("objective", ["standard", "lacy-static", "loss", "rho", "judge", "random", "ignore-lacy"])
def test_objectives_run(tmp_path, dataset, small_gpt2, objective):
    config = configured(dataset, small_gpt2, tmp_path / "run", objective=objective, max_steps=2, accumulate=2)
    train(config)
    record = next(record for record in runs.log(config) if "loss" in record)
    calls = not objective.startswith("ignore") and objective != "standard"
    assert (record["call_loss"] is not None) == calls == (record["called"] > 0)
    assert record["gt_tokens"] < record["tokens"] or objective == "standard"


@pytest.mark.parametrize("option", ["checkpoint_activations", "mask_documents"])
def test_options_that_change_no_result(tmp_path, dataset, small_gpt2, option):
    pass
