"""The dataset card, and that tools which know nothing of LaCy read the folders."""

import shutil

import datasets
import duckdb
import fsspec
import pandas as pd
import pytest
import yaml

from lacy.schemas.card import MARK, NAME, card, write_card
from lacy.schemas.manifest import OLD_POLICY, at, label_sets, policy_path, read_complete
from tests.stats.conftest import SETS, by_loss, corpus, write

DOCUMENTS = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = write(
        tmp_path_factory.mktemp("card") / "d", corpus(DOCUMENTS), sets=SETS | {"z-Ünïcode-1.5": by_loss(4.0)}
    )
    write_card(folder, read_complete(folder))
    return folder


def front_matter(text):
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_front_matter_names_signals_and_each_label_set(dataset):
    matter, body = front_matter((dataset / NAME).read_text())
    assert matter == {
        "configs": [
            {"config_name": "signals", "data_files": "signals/*.parquet", "default": True},
            {"config_name": "labels-lacy", "data_files": "labels/lacy/*.parquet"},
            {"config_name": "labels-z-Ünïcode-1.5", "data_files": "labels/z-Ünïcode-1.5/*.parquet"},
        ]
    }
    assert f"{DOCUMENTS} documents" in body and "label set `lacy`" in body and "quoted" not in body


def test_datasets_opens_each_configuration(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def columns(*configuration):
        opened = datasets.load_dataset(str(dataset), *configuration, cache_dir=str(tmp_path))["train"]
        assert sorted(opened["doc_id"]) == sorted(row.doc_id for row in corpus(DOCUMENTS))
        return opened.column_names

    assert "ent_type" in columns() and columns() == columns("signals")
    assert "label" in columns("labels-lacy") and "label" in columns("labels-z-Ünïcode-1.5")


def test_pandas_and_duckdb_read_the_folders(dataset):
    for folder in ("signals", "labels/lacy"):
        assert len(pd.read_parquet(dataset / folder)) == DOCUMENTS
        assert duckdb.sql(f"SELECT count(*) FROM '{dataset / folder}/*.parquet'").fetchall() == [(DOCUMENTS,)]


def test_the_same_dataset_has_the_same_card_in_a_store(dataset):
    store = fsspec.filesystem("memory")
    store.put(str(dataset), "/card/d", recursive=True)
    store.rm(f"/card/d/{NAME}")
    remote = at("memory://card/d")
    write_card(remote, read_complete(remote))
    assert (remote / NAME).read_bytes() == (dataset / NAME).read_bytes()


def test_an_edited_card_is_kept(dataset, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "d")
    for text, kept in (("mine", True), (f"{MARK}\n", False)):
        (folder / NAME).write_text(text)
        write_card(folder, read_complete(folder))
        assert ((folder / NAME).read_text() == text) == kept


def test_a_policy_under_its_old_name_is_read(dataset, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "d")
    policy_path(folder, "lacy").rename(policy_path(folder, "lacy").with_name(OLD_POLICY))
    assert label_sets(folder) == label_sets(dataset)
    assert card(read_complete(folder), label_sets(folder)) == (dataset / NAME).read_text()
