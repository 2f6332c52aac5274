"""The end of a labelling run: records become the manifest, whoever else has done so already."""

import numpy as np
import pyarrow as pa
import pytest

from lacy.pipeline.corpus.deadletters import Code, dead_letter, fault
from lacy.pipeline.fold import fold, lost_parts
from lacy.pipeline.write import is_finished, write_part
from lacy.schemas import files, manifest
from lacy.schemas.manifest import LabelSet, Manifest, at, read_manifest
from lacy.schemas.parts import SIGNALS
from tests.stores.conftest import SERVERS

UNDECIDED = {"action": "delegate", "budget": 0.15, "seed": 0, "tokens": 8, "candidates": 0, "chosen": 0, "share": 0.0}
UNDECIDED |= {"threshold": None, "parts": []}
PARTS = {"part-00000-0": ["a", "b", "c"], "part-00000-9": ["d", "b"], "part-00001-0": ["a"], "part-00002-0": []}


@pytest.fixture(params=["local", "memory", "s3"])
def dataset(request, tmp_path):
    if request.param != "s3":
        yield tmp_path / "d" if request.param == "local" else at(f"memory://{tmp_path.name}/d")
        return
    with SERVERS["s3"]() as store:
        store.proxy.every(7)
        yield at(f"{store.new()}/d")


def measured(dataset, names=tuple(PARTS)):
    """What workers write: each document has two tokens."""
    for name in names:
        ids = PARTS[name]
        lists = pa.array([[1, 2]] * len(ids), pa.list_(pa.int32()))
        columns = {"doc_id": ids, "source": [f"{name}.jsonl:{row}" for row in range(len(ids))], "text": ids}
        columns |= {"factual": [[True, False]] * len(ids), "ref_nll": [[None, 1.0]] * len(ids)}
        columns |= {field: lists for field in ("token_ids", "token_starts", "token_ends", "pos", "ent_type")}
        fields = [field for field in SIGNALS if field.name in columns]
        table = pa.table([pa.array(columns[f.name]).cast(f.type) for f in fields], schema=pa.schema(fields))
        write_part(
            dataset, name, f"{name}.jsonl", table, (dead_letter(f"{name}.jsonl", 7, fault(Code.NO_TEXT)),), skipped=1
        )


def begun(dataset):
    fresh = Manifest(state="running", corpus=[], options={}, tokenizer={}, models={}, versions={})
    manifest.save(dataset / "manifest.json", fresh, create=True)


def contents(dataset):
    folders = ["", "signals", "deadletter", ".parts", ".spool"]
    return {
        f"{folder}/{name}": files.read_bytes(dataset / folder / name if folder else dataset / name)
        for folder in folders
        for name in files.sizes(dataset / folder if folder else dataset)
    }


def test_folded_once_and_again(dataset):
    begun(dataset)
    measured(dataset)
    files.write_atomic(dataset / ".spool" / "part-00000-0.jsonl", b"a copy")
    assert is_finished(dataset, "part-00000-0") and not is_finished(dataset, "part-00007-0")
    whole = fold(dataset, max_bad=1.0)
    assert whole == read_manifest(dataset) and whole.state == "complete"
    assert (whole.documents, whole.tokens, whole.bad, whole.skipped) == (4, 8, 6, 4)
    assert [record.rows for record in whole.parts] == [3, 1, 0, 0]
    first = contents(dataset)
    assert first.keys() == {
        "/manifest.json", "/README.md", *(f"signals/{name}.parquet" for name in list(PARTS)[:2]),
        *(f"deadletter/{name}.jsonl" for name in PARTS),
    }  # fmt: skip
    assert is_finished(dataset, "part-00007-0")

    # Another run of the same command was at work all the time, and writes some parts once more.
    measured(dataset, list(PARTS)[1:3])
    assert contents(dataset) != first
    assert fold(dataset, max_bad=1.0) == whole
    assert contents(dataset) == first


def test_parts_that_lost_a_file_are_found(dataset):
    begun(dataset)
    measured(dataset)
    whole = fold(dataset, max_bad=1.0)
    assert lost_parts(dataset, whole) == []
    signals, short, letters, empty = (record.name for record in whole.parts)
    files.remove(manifest.signals_path(dataset, signals))
    files.write_atomic(manifest.signals_path(dataset, short), b"PAR1")
    files.remove(manifest.deadletter_path(dataset, letters))
    assert [record.name for record in lost_parts(dataset, whole)] == [signals, short, letters]
    assert empty == "part-00002-0"


def test_a_record_without_its_file_is_not_finished(dataset):
    """A store may have been cleaned up by hand; the part is then measured again."""
    begun(dataset)
    measured(dataset)
    files.remove(manifest.signals_path(dataset, "part-00000-0"))
    whole = fold(dataset, max_bad=1.0)
    assert [record.name for record in whole.parts] == list(PARTS)[1:]
    assert np.sum([record.rows for record in whole.parts]) == whole.documents == 3


@pytest.mark.parametrize("changed", [False, True])
def test_a_repair_keeps_label_sets_only_if_the_bytes_are_as_before(dataset, changed, monkeypatch):
    begun(dataset)
    measured(dataset)
    whole = fold(dataset, max_bad=1.0)
    manifest.save(manifest.policy_path(dataset, "lacy"), LabelSet(name="lacy", policy="lacy", **UNDECIDED))
    [first, second, *_] = PARTS
    for name in (first, second):
        files.remove(manifest.signals_path(dataset, name))
    manifest.save(dataset / "manifest.json", whole.model_copy(update={"state": "running"}))
    measured(dataset, [first])  # and the repair is interrupted
    assert {record.name for record in lost_parts(dataset, whole)} == {second}
    if changed:
        monkeypatch.setitem(PARTS, second, ["d", "e"])
    measured(dataset, [second])
    repaired = fold(dataset, max_bad=1.0)
    assert (repaired == whole) is not changed
    assert bool(files.sizes(dataset / "labels" / "lacy", "_policy.json")) is not changed
