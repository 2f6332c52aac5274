"""A small dataset has held-out documents too, so that what was trained on it can be evaluated."""

import pyarrow.parquet as pq
import pytest

from lacy.cascade.evaluation.delegation import Options, evaluate, settle
from lacy.schemas.errors import CascadeError, DatasetError
from lacy.schemas.manifest import labels_path
from lacy.trainer import shards
from lacy.trainer.checkpoint import newest
from lacy.trainer.config import TrainConfig
from lacy.trainer.train import train
from tests.stats.conftest import by_loss
from tests.support import models
from tests.support.datasets import make
from tests.support.tales import labelled, marked, tale

NONE_HELD_OUT = 1e-6


def held_out(labels, share):
    """The ids of the held-out documents, and the number of all."""
    names, count = [], 0
    for record in labels.records:
        with pq.ParquetFile(labels_path(labels.root, labels.name, record.name)) as file:
            held = shards.is_held(file, share)
            names += [name for name, out in zip(file.read(["doc_id"])["doc_id"].to_pylist(), held, strict=True) if out]
            count += len(held)
    return names, count


@pytest.mark.parametrize("documents, expected", [(1, 0), (2, 1), (3, 1), (4, 2), (22, 2), (90, 2)])
def test_two_documents_are_held_out_where_the_share_holds_out_none(tmp_path, documents, expected):
    parts = 2 if documents % 2 == 0 else 1
    labels = shards.open_labels(str(make(tmp_path / "d", parts=parts, documents=documents // parts)), None)
    share, count = shards.enough_held_out(labels, NONE_HELD_OUT)
    names, total = held_out(labels, share)
    assert (len(names), count, total) == (expected, expected, documents)
    assert share >= NONE_HELD_OUT and shards.enough_held_out(labels, share) == (share, expected)


def test_a_share_that_holds_out_a_document_is_left_as_it_is(dataset):
    labels = shards.open_labels(str(dataset), None)
    assert shards.enough_held_out(labels, 0.1) == (0.1, 2) and shards.enough_held_out(labels, 0) == (0, 0)
    two, _ = shards.enough_held_out(labels, NONE_HELD_OUT)
    one = two * (1 - 1e-9)
    assert len(held_out(labels, one)[0]) == 1 and shards.enough_held_out(labels, one) == (one, 1)


def test_a_document_without_tokens_does_not_count(tmp_path):
    labels = shards.open_labels(str(make(tmp_path / "d", documents=20, length=(0, 2))), None)
    share, count = shards.enough_held_out(labels, NONE_HELD_OUT)
    assert count == 2 and len(held_out(labels, share)[0]) >= 2


def test_a_run_on_a_small_dataset_can_be_evaluated(tmp_path):
    """What the demo's dataset does: 22 documents, a hundredth of them."""
    tokenizer = models.byte_level(600)
    documents = [marked(f"tale-{number}", tale(number), tokenizer) for number in range(22)]
    dataset = tmp_path / "d"
    labelled(dataset, documents, tokenizer, sets={"lacy": by_loss(4.0)})
    told = []
    config = TrainConfig(
        dataset=str(dataset), out=tmp_path / "run", model="tiny", context=32, batch=2, max_steps=2, device="cpu",
        loader_workers=0, tensorboard=False, holdout=NONE_HELD_OUT,
    )  # fmt: skip
    train(config, lambda kind, facts: told.append((kind, facts)))
    (note,) = [facts["text"] for kind, facts in told if kind == "note"]
    assert note == "--holdout 1e-06 would hold out no document: 2 documents are held out"
    assert "valid" in {kind for kind, _ in told}
    settled, labels = settle(newest(config.out), Options())
    names, _ = held_out(labels, settled.holdout)
    assert len(names) == 2
    assert evaluate(config.out, Options(device="cpu")).figures["documents"] == 1  # the other one is to fit a weight on
    with pytest.raises(CascadeError, match="was trained on"):
        settle(newest(config.out), Options(holdout=0.5))


def test_a_run_that_held_out_nothing_is_resumed_but_not_evaluated_on_what_it_has_seen(tmp_path, monkeypatch):
    """As an older version trained on a small dataset."""
    tokenizer = models.byte_level(600)
    documents = [marked(f"tale-{number}", tale(number), tokenizer) for number in range(8)]
    labelled(tmp_path / "d", documents, tokenizer, sets={"lacy": by_loss(4.0)})
    config = TrainConfig(
        dataset=str(tmp_path / "d"), out=tmp_path / "run", model="tiny", context=32, batch=2, max_steps=1, device="cpu",
        loader_workers=0, tensorboard=False, holdout=NONE_HELD_OUT,
    )  # fmt: skip
    with monkeypatch.context() as older:
        older.setattr(shards, "enough_held_out", lambda labels, holdout: (holdout, 0))
        train(config)
    assert train(config.model_copy(update={"max_steps": 2})).progress.step == 2
    settled, _ = settle(newest(config.out), Options())
    assert settled.holdout == NONE_HELD_OUT
    with pytest.raises(DatasetError, match="none of the documents"):
        evaluate(config.out, Options(device="cpu"))
