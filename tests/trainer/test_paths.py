"""A run finds its dataset and its model from another folder, and after it has moved together with them."""

import shutil

import pytest
import yaml

from lacy.cascade.evaluation.delegation import Options, settle
from lacy.schemas.errors import CascadeError, TrainingError
from lacy.trainer.checkpoint import newest
from lacy.trainer.config import load
from lacy.trainer.paths import absolute
from lacy.trainer.train import train

OPTIONS = {
    "batch": 2, "context": 32, "max_steps": 2, "save_every": 1, "holdout": 0.1, "loader_workers": 0, "device": "cpu",
    "tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset, still_gpt2):
    """A folder with `data`, `model` and `runs/run`, which was trained with relative paths."""
    folder = tmp_path_factory.mktemp("relative")
    shutil.copytree(dataset, folder / "data")
    shutil.copytree(still_gpt2, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        given = {"dataset": "data", "model": "model", "out": "runs/run"}
        assert train(load(OPTIONS | given, None, resume=False)).progress.step == 2
    return folder


def resume(folder):
    return train(load({"out": folder / "runs/run", "max_steps": 3}, None, resume=True)).progress.step


def test_a_run_is_resumed_and_evaluated_from_another_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settled, labels = settle(newest(trained / "runs/run"), Options())
    assert labels.root == trained / "data" and settled.dataset == str(trained / "data")
    assert resume(trained) == 3


def test_a_run_that_moved_with_its_dataset(trained, tmp_path, monkeypatch):
    moved = shutil.copytree(trained, tmp_path / "moved")
    hidden = trained.rename(trained.with_name("hidden"))
    try:
        monkeypatch.chdir(tmp_path)
        assert settle(newest(moved / "runs/run"), Options())[1].root == moved / "data"
        assert resume(moved) == 3
        recorded = yaml.safe_load((moved / "runs/run/config.yaml").read_text())
        assert (recorded["dataset"], recorded["out"]) == (str(moved / "data"), str(moved / "runs/run"))
    finally:
        hidden.rename(trained)


def test_a_dataset_that_is_gone_is_named_by_an_option(trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    hidden = (trained / "data").rename(trained / "hidden")
    try:
        with pytest.raises(TrainingError, match=r"lacy train DATASET .* --resume"):
            resume(tmp_path)
        with pytest.raises(CascadeError, match="pass its new path with --dataset"):
            settle(newest(tmp_path / "runs/run"), Options())
        named = Options(dataset=str(hidden))
        assert settle(newest(tmp_path / "runs/run"), named)[1].root == hidden
    finally:
        hidden.rename(trained / "data")


def test_urls_stay_as_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert [absolute(path) for path in ("s3://a/b", "d", "/d/../e")] == ["s3://a/b", str(tmp_path / "d"), "/e"]
