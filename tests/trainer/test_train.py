"""Whole runs: killed and resumed, on several ranks, ended by signals and limits, refused."""

import importlib.util
import math
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from lacy.schemas.errors import DatasetError, TrainingError
from lacy.trainer.config import TrainConfig
from lacy.trainer.train import train
from tests.support import runs
from tests.support.datasets import make

STEPS = 14


def configured(dataset, model, out, **options):
    given = {
        "model": str(model), "batch": 2, "context": 32, "max_steps": STEPS, "save_every": 3, "log_every": 1,
        "eval_every": 5, "holdout": 0.1, "buffer_tokens": 500, "loader_workers": 0, "tensorboard": False,
    }  # fmt: skip
    return TrainConfig(dataset=str(dataset), out=out, **(given | options))


@pytest.mark.parametrize(
    "ranks, workers, parallel",
    [
        pytest.param(1, 0, "ddp", marks=pytest.mark.slow),
        (1, 2, "ddp"),
        pytest.param(2, 0, "ddp", marks=pytest.mark.slow),
        (2, 0, "fsdp"),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, dataset, small_gpt2, ranks, workers, parallel):
    """The model has dropout, so the random state counts too."""
    whole = configured(dataset, small_gpt2, tmp_path / "whole", loader_workers=workers, parallel=parallel)
    runs.run(whole, ranks)
    broken = whole.model_copy(update={"out": tmp_path / "broken"})
    for step in sorted(random.Random(ranks + workers).sample(range(1, STEPS), 2)):
        runs.killed(broken, step, ranks)
    runs.run(broken, ranks)
    assert [record["step"] for record in runs.log(whole) if "loss" in record] == list(range(1, STEPS + 1))
    assert runs.log(broken) == runs.log(whole)
    assert runs.state(broken) == runs.state(whole)


@pytest.mark.parametrize(
    "ranks, accumulate, parallel",
    [pytest.param(2, 1, "ddp", marks=pytest.mark.slow), (2, 1, "fsdp"), (2, 2, "ddp")],
)
@pytest.mark.parametrize("objective", ["lacy"])
def test_ranks_together_do_what_one_does(tmp_path, dataset, still_gpt2, objective, ranks, accumulate, parallel):
    """Four sequences in a micro-batch of one rank, or two in each of two ranks: the same ones are chosen."""
    given = {"objective": objective, "accumulate": accumulate, "max_steps": 4, "lr": 1e-3}
    alone = configured(dataset, still_gpt2, tmp_path / "alone", batch=4, **given)
    together = configured(dataset, still_gpt2, tmp_path / "together", batch=4 // ranks, parallel=parallel, **given)
    runs.steps(alone, 1)
    runs.steps(together, ranks)
    one, two = (torch.load(config.out / "weights.pt", weights_only=True) for config in (alone, together))
    assert one.keys() == two.keys()
    assert one["told"][1] > one["told"][3] > 0  # both kinds of targets
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize(
    "options", [{"checkpoint_activations": True}, pytest.param({"compile": "on"}, marks=pytest.mark.slow)]
)
def test_options_that_change_no_loss(tmp_path, dataset, still_gpt2, options):
    plain = configured(dataset, still_gpt2, tmp_path / "plain", max_steps=3)
    other = configured(dataset, still_gpt2, tmp_path / "other", max_steps=3, **options)
    losses = [[record["loss"] for record in _trained(config) if "loss" in record] for config in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bfloat16_trains(tmp_path, dataset, still_gpt2):
    plain = configured(dataset, still_gpt2, tmp_path / "plain", max_steps=3)
    narrow = configured(dataset, still_gpt2, tmp_path / "narrow", max_steps=3, precision="bf16")
    losses = [[record["loss"] for record in _trained(config) if "loss" in record] for config in (plain, narrow)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    weights = load_file(runs.last(narrow) / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.parametrize("batch", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_shards_of_bfloat16_learn_together(tmp_path, dataset, still_gpt2, batch):
    given = {"batch": batch, "precision": "bf16", "max_steps": 3}
    sharded = configured(dataset, still_gpt2, tmp_path / "sharded", parallel="fsdp", **given)
    whole = configured(dataset, still_gpt2, tmp_path / "whole", **given)
    runs.run(sharded, 2)
    runs.run(whole, 2)
    losses = [[record["loss"] for record in runs.log(config) if "loss" in record] for config in (sharded, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path, dataset, small_gpt2, deaf):
    config = configured(dataset, small_gpt2, tmp_path / "run", max_steps=100_000, save_every=100_000)
    (process,) = runs.start(config, deaf=deaf)
    while len(runs.log(config)) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0, f"at step {runs.log(config)[-1]['step']}"
    step = int(runs.last(config).name.removeprefix("step-"))
    assert step == max(record["step"] for record in runs.log(config)) >= 3


@pytest.mark.parametrize("limit", [{"gt_tokens": 300}, {"epochs": 0.1}, {"max_steps": 4, "gt_tokens": 10_000}])
def test_limits(tmp_path, dataset, small_gpt2, limit):
    outcome = train(configured(dataset, small_gpt2, tmp_path / "run", **({"max_steps": None} | limit)))
    progress = outcome.progress
    assert progress.tokens == progress.step * 2 * 32
    learned = [
        record["gt_tokens"]
        for record in runs.log(configured(dataset, small_gpt2, tmp_path / "run"))
        if "loss" in record
    ]
    if "epochs" in limit:
        assert progress.step == 6
    elif limit.get("max_steps"):
        assert progress.step == 4
    else:
        assert learned[-2] < 300 <= learned[-1] == progress.gt_tokens


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


def test_a_model_learns(tmp_path, dataset, still_gpt2):
    """Words depend on those before them, and the factual ones are random: it learns the others, and to call."""
    config = configured(
        dataset, still_gpt2, tmp_path / "run", max_steps=400, batch=16, lr=0.01, eval_every=400, log_every=100
    )
    train(config)
    valid = [record for record in runs.log(config) if "nll_other" in record][-1]
    assert valid["nll_other"] < 3.0 < math.log(200) - 1 < valid["nll_factual"]
    assert runs.log(config)[0]["learn_loss"] > 1.5 * runs.log(config)[-2]["learn_loss"]


def test_a_step_that_is_no_number_ends_the_run_and_leaves_the_checkpoint(tmp_path, dataset, still_gpt2):
    config = configured(dataset, still_gpt2, tmp_path / "run", max_steps=3)
    train(config)
    with pytest.raises(TrainingError, match=r"the loss of step \d is nan.*--lr"):
        train(configured(dataset, still_gpt2, tmp_path / "mad", max_steps=50, lr=1e30, clip=1e30, warmup=0))
    assert not list((tmp_path / "mad" / "checkpoints").glob("*")) or not _is_nan(tmp_path / "mad")


def test_a_disk_that_fills_while_saving_leaves_the_last_checkpoint(tmp_path, dataset, still_gpt2):
    """The size of files is limited in the process, which is as real an error of writing as that of a full disk."""
    config = configured(dataset, still_gpt2, tmp_path / "run", max_steps=3)
    train(config)
    before = runs.state(config)
    longer = config.model_copy(update={"max_steps": 9})
    message = runs.fails(longer, largest_file=20_000)
    assert re.fullmatch(
        r"cannot save .*step-00000006: File too large.*; the last good checkpoint is .*step-00000003: make room, "
        r"then resume with --resume",
        message,
    )
    assert runs.state(config) == before
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-00000003"]
    train(longer)
    assert runs.last(longer).name == "step-00000009"


def test_other_data_on_resuming(tmp_path, dataset, still_gpt2):
    config = configured(dataset, still_gpt2, tmp_path / "run", max_steps=2)
    train(config)
    other = make(tmp_path / "other", seed=1)
    with pytest.raises(DatasetError, match="other data"):
        train(config.model_copy(update={"dataset": str(other), "max_steps": 4}))


def test_other_ranks_on_resuming(tmp_path, dataset, still_gpt2):
    config = configured(dataset, still_gpt2, tmp_path / "run", max_steps=2)
    train(config)
    longer = config.model_copy(update={"max_steps": 4})
    assert "was saved by 1 ranks, this run has 2" in runs.fails(longer, ranks=2)


def test_a_damaged_checkpoint(tmp_path, dataset, still_gpt2):
    config = configured(dataset, still_gpt2, tmp_path / "run", max_steps=6)
    train(config)
    weights = runs.last(config) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        TrainingError, match=r"step-00000006 is damaged .*: remove it and resume from the checkpoint before it"
    ):
        train(config)
    shutil.rmtree(runs.last(config))
    assert train(config).progress.step == 6


def test_tensorboard_has_what_the_log_has(tmp_path, dataset, still_gpt2):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configured(dataset, still_gpt2, tmp_path / "run", max_steps=5, tensorboard=True)
    train(config)
    train(config.model_copy(update={"max_steps": 10}))
    board = EventAccumulator(str(config.out / "tensorboard")).Reload()
    told = {name: [(r["step"], r[name]) for r in runs.log(config) if name in r] for name in ("loss", "nll_other")}
    for name, tag in (("loss", "train/loss"), ("nll_other", "valid/nll_other")):
        assert [(event.step, event.value) for event in board.Scalars(tag)] == [
            (step, pytest.approx(value, rel=1e-5)) for step, value in told[name]
        ]
    assert len(told["loss"]) == 10 and len(told["nll_other"]) == 2


def test_wandb_is_asked_for_by_name(tmp_path, dataset, still_gpt2):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(TrainingError, match="--wandb needs its package: pip install wandb"):
        train(configured(dataset, still_gpt2, tmp_path / "run", wandb="project"))


def test_a_dataset_of_one_document_has_none_to_hold_out(tmp_path, still_gpt2):
    dataset = make(tmp_path / "d", parts=1, documents=1)
    config = configured(dataset, still_gpt2, tmp_path / "run", max_steps=2, holdout=1e-9)
    heard = []
    train(config, lambda what, told: heard.append(what))
    assert "valid" not in heard and "note" in heard


def _trained(config):
    train(config)
    return runs.log(config)


def _is_nan(out):
    folders = (out / "checkpoints").iterdir()
    return any(tensor.isnan().any() for f in folders for tensor in load_file(f / "model.safetensors").values())
