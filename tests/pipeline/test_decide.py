"""`lacy decide` in a folder and in a store: the same bytes, one request for each part and pass, no half label set."""

import json
import shutil

import fsspec
import pytest

from lacy.pipeline import batches, decide_graph
from lacy.pipeline.decide import decide, decided
from lacy.schemas.errors import PolicyError, RunError
from lacy.schemas.manifest import at, label_sets


@pytest.fixture
def dataset(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "d")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_size_of_a_batch_changes_nothing(dataset, monkeypatch):
    decide(dataset, "loss", budget=0.2)
    before = contents(dataset / "labels/loss")
    assert json.loads(before["_policy.json"])["chosen"] == round(0.2 * label_sets(dataset)["loss"].tokens)
    monkeypatch.setattr(batches, "PARTS", 2)
    decide(dataset, "loss", budget=0.2)
    assert contents(dataset / "labels/loss") == before


def test_a_store(dataset):
    store, place = fsspec.filesystem("memory"), at("memory://decide/d")
    store.put(str(dataset), "/decide/d", recursive=True)
    decide(dataset, "loss", budget=0.2)
    opened = []
    real = type(store).cat_file
    type(store).cat_file = lambda self, path, *args, **more: (opened.append(path), real(self, path, *args, **more))[1]
    try:
        decide(place, "loss", budget=0.2)
    finally:
        type(store).cat_file = real
    assert contents(place / "labels/loss") == contents(dataset / "labels/loss")
    signals = [path for path in opened if "/signals/" in path]
    assert len(signals) <= 5 * len(set(signals)) and not store.exists("/decide/d/labels/loss/.parts")


def test_readers_never_see_half_a_label_set(dataset, monkeypatch):
    decide(dataset, "loss", budget=0.2)
    seen, write = [], decide_graph.write_atomic

    def fail(path, data, **options):
        seen.append("loss" in label_sets(dataset))
        if len(seen) == 2:
            raise OSError("the disk is full")
        write(path, data, **options)

    monkeypatch.setattr(decide_graph, "write_atomic", fail)
    with pytest.raises(RunError, match="the disk is full"):
        decide(dataset, "loss", budget=0.1)
    assert seen and not any(seen) and "loss" not in label_sets(dataset)
    monkeypatch.undo()
    (dataset / "labels/loss/part-stray.parquet").touch()
    decide(dataset, "loss", budget=0.1)
    assert contents(dataset / "labels/loss").keys() == contents(dataset / "labels/lacy").keys()


def test_a_decision_that_was_made_before(dataset):
    assert decided(dataset, "loss") is None
    found = decided(dataset, "lacy")
    assert found == label_sets(dataset)["lacy"]
    for other in ({"budget": 0.2}, {"action": "ignore"}, {"seed": 1}):
        assert decided(dataset, "lacy", **other) is None
    part = dataset / "labels/lacy" / f"{found.parts[0].name}.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    assert decided(dataset, "lacy") is None
    decide(dataset, "lacy")
    assert decided(dataset, "lacy") == found


@pytest.mark.parametrize("policy", ["factual", "none"])
def test_a_budget_without_effect_is_refused(dataset, policy):
    with pytest.raises(PolicyError, match=f"policy {policy} has no budget: leave out --budget"):
        decide(dataset, policy, budget=0.2)
    assert decide(dataset, policy).budget is None
