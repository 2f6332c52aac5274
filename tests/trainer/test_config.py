"""Flags, YAML file and record of a run make one configuration, in one order."""

import pytest
import yaml
from pydantic import ValidationError

from lacy.schemas.errors import UsageError
from lacy.trainer import objectives
from lacy.trainer.config import FREE, OBJECTIVES, TrainConfig, load, save


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_flags_go_before_the_file_and_the_file_before_the_defaults(tmp_path):
    file = write(tmp_path / "run.yaml", dataset="d", batch=4, lr=0.1)
    config = load({"out": tmp_path / "run", "lr": 0.2}, file, resume=False)
    assert (config.dataset, config.batch, config.lr, config.accumulate) == ("d", 4, 0.2, 1)


def test_names_in_a_file_may_be_spelled_like_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("dataset: d\nmax-steps: 3\n")
    assert load({"out": tmp_path / "run"}, tmp_path / "run.yaml", resume=False).max_steps == 3


def test_a_saved_configuration_is_the_base_of_the_resumed_run(tmp_path):
    config = TrainConfig(dataset="d", out=tmp_path / "run", batch=3, seed=5, max_steps=10)
    save(config)
    assert load({"out": tmp_path / "run"}, None, resume=True) == config
    longer = load({"out": tmp_path / "run", "max_steps": 20}, None, resume=True)
    assert (longer.max_steps, longer.seed) == (20, 5)


def test_a_resumed_run_may_not_become_another(tmp_path):
    save(TrainConfig(dataset="d", out=tmp_path / "run", seed=5))
    with pytest.raises(UsageError, match=r"--seed was 5 when .* began, and is 6 now"):
        load({"out": tmp_path / "run", "seed": 6}, None, resume=True)


def test_every_field_but_the_free_ones_is_held(tmp_path):
    other = {
        "labels": "x", "holdout": 0.5, "context": 7, "mask_documents": True, "buffer_tokens": 7, "loader_workers": 7,
        "model": "tiny", "objective": "loss", "budget": 0.5, "learn_softmax": "detached", "batch": 7, "accumulate": 7,
        "lr": 7.0, "min_lr": 0.7, "schedule": "wsd", "warmup": 7, "decay": 0.7, "beta1": 0.7, "beta2": 0.7,
        "weight_decay": 7.0, "dropout": 0.7, "clip": 7.0, "seed": 7, "precision": "fp32", "parallel": "fsdp",
        "deterministic": True,
    }  # fmt: skip
    assert other.keys() | FREE == set(TrainConfig.model_fields)
    save(TrainConfig(dataset="d", out=tmp_path / "run"))
    for name, value in other.items():
        with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
            load({"out": tmp_path / "run", name: value}, None, resume=True)


def test_a_folder_in_use(tmp_path):
    save(TrainConfig(dataset="d", out=tmp_path / "run"))
    with pytest.raises(UsageError, match="holds a run: resume it with --resume"):
        load({"out": tmp_path / "run", "dataset": "d"}, None, resume=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="has files in it and is not a run"):
        load({"out": tmp_path / "other", "dataset": "d"}, None, resume=True)


def test_resuming_what_has_not_begun_begins_it(tmp_path):
    assert load({"out": tmp_path / "run", "dataset": "d"}, None, resume=True).dataset == "d"


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", ""])
def test_a_file_that_is_no_configuration(tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"run\.yaml"):
        load({"out": tmp_path / "run", "dataset": "d"}, tmp_path / "run.yaml", resume=False)
    with pytest.raises(UsageError, match=r"cannot read .*missing\.yaml: No such file"):
        load({"out": tmp_path / "run", "dataset": "d"}, tmp_path / "missing.yaml", resume=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "lcy"},
        {"budget": 1.5},
        {"unknown": 1},
        {"precision": "tf32", "device": "cpu"},
        {"lr": 0},
        {"mask_documents": True, "dropout": 0.1},
    ],
)
def test_values_out_of_range(tmp_path, wrong):
    with pytest.raises(ValidationError):
        load({"out": tmp_path / "run", "dataset": "d"} | wrong, None, resume=False)


def test_the_objectives_are_those_that_can_be_parsed():
    assert set(OBJECTIVES) == {*objectives._NEEDS, *(f"ignore-{name}" for name in objectives._NEEDS)} - {
        "ignore-standard"
    }
    assert all(objectives.parse(name) for name in OBJECTIVES)
