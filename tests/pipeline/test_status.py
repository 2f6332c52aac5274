"""How far a run is, by what its dataset holds: the very files, and the times that they were written at."""

import json
import os
import shutil
from dataclasses import asdict

import pytest

from lacy.pipeline.corpus.sources import SPOOL, Range, plan_parts
from lacy.pipeline.runners.counts import Counts
from lacy.pipeline.status import counter, status, update
from lacy.schemas.errors import DatasetError
from lacy.schemas.files import remove, write_atomic
from lacy.schemas.manifest import CorpusFile, Manifest, PartRecord, at, load, read_manifest, record_path, save

NOW = 2_000_000_000.0


@pytest.fixture(params=["folder", "store"])
def dataset(request, tmp_path):
    """A run that has begun: one file in 10 parts of 1,000 bytes."""
    place = tmp_path / "d" if request.param == "folder" else at(f"memory://{tmp_path.name}/d")
    begin(place, [CorpusFile(path="c.jsonl", bytes=10_000)])
    yield place
    remove(place / "manifest.json")


def begin(dataset, corpus, **options):
    told = {"options": {"part_bytes": 1000, "limit": None} | options, "tokenizer": {}, "models": {}, "versions": {}}
    save(dataset / "manifest.json", Manifest(state="running", corpus=corpus, **told))


def record(dataset, name, seconds_ago=0.0, rows=2, tokens=50, bad=1):
    told = {"name": name, "source": "c.jsonl", "rows": rows, "tokens": tokens, "factual": 0, "bad": bad}
    save(record_path(dataset, name), PartRecord(**told, bytes=1, sha256=""))
    if not hasattr(dataset, "fs"):
        os.utime(record_path(dataset, name), (NOW - seconds_ago,) * 2)


def names(dataset):
    return [part.name for part in plan_parts(read_manifest(dataset).corpus, 1000)]


def test_nothing_yet(tmp_path):
    assert status(tmp_path / "none").state == "none"
    assert status(tmp_path).state == "none"
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DatasetError, match="damaged"):
        status(tmp_path)


def test_counts(dataset):
    for name in names(dataset)[:4]:
        record(dataset, name)
    found = status(dataset)
    assert (found.state, found.parts, found.parts_planned, found.uncut) == ("running", 4, 10, 0)
    assert (found.documents, found.tokens, found.bad) == (8, 200, 4)
    assert (found.corpus_bytes, found.corpus_bytes_done, found.share) == (10_000, 4000, 0.4)


def test_records_are_read_once(dataset, monkeypatch):
    known = {}
    record(dataset, names(dataset)[0])
    assert update(dataset, known) == [] and len(known) == 1
    record(dataset, names(dataset)[1])
    asked = []
    monkeypatch.setattr("lacy.pipeline.status.read_many", lambda paths: asked.extend(paths) or [])
    with pytest.raises(ValueError):
        update(dataset, known)  # what was asked for did not come
    assert [path.name for path in asked] == [f"{names(dataset)[1]}.json"]


def test_a_damaged_record_is_reported(dataset):
    record(dataset, names(dataset)[0])
    (dataset / ".parts" / f"{names(dataset)[1]}.json").write_bytes(b"{")
    found = status(dataset)
    assert found.parts == 1
    assert found.stuck == [
        f".parts/{names(dataset)[1]}.json is damaged: remove them, and their parts are measured again"
    ]


@pytest.fixture
def folder(tmp_path):
    begin(tmp_path / "d", [CorpusFile(path="c.jsonl", bytes=10_000)])
    return tmp_path / "d"


def test_pace_and_what_is_left(folder):
    for name, ago in zip(names(folder), (5000, 90, 60, 30), strict=False):
        record(folder, name, ago)
    found = status(folder, now=NOW)
    assert found.last_part == NOW - 30
    assert found.parts_per_second == pytest.approx(2 / 90)
    assert found.tokens_per_second == pytest.approx(100 / 90)
    assert found.seconds_left == pytest.approx(6 * 90 / 2)
    assert found.stuck == []


def test_a_stalled_run(folder):
    for name, ago in zip(names(folder), range(520, 430, -10), strict=False):
        record(folder, name, ago)
    left = names(folder)[-1]
    found = status(folder, now=NOW)
    assert found.stuck[0].startswith("no part was finished for 7 minutes")
    assert found.stuck[1:] == [f"left: {left} (c.jsonl, bytes 9,000 to 10,000)"]
    record(folder, left, 399)
    assert status(folder, now=NOW).stuck[0].startswith("all parts are measured")


def test_streams_by_the_list_of_their_pieces(tmp_path):
    dataset = tmp_path / "d"
    begin(dataset, [CorpusFile(path="a.jsonl.gz", bytes=600), CorpusFile(path="b.jsonl", bytes=1400)])
    assert status(dataset).uncut == 1 and status(dataset).parts_planned == 2
    pieces = [Range(f"part-00000-{start:015d}", "a.jsonl.gz", "x", "jsonl", 0, 1000) for start in (0, 1000, 2000)]
    (dataset / SPOOL).mkdir()
    (dataset / SPOOL / "stream-00000.json").write_text(json.dumps([asdict(piece) for piece in pieces]))
    record(dataset, pieces[0].name)
    found = status(dataset)
    assert (found.uncut, found.parts, found.parts_planned, found.corpus_bytes_done) == (0, 1, 5, 200)
    assert found.share == pytest.approx(0.1)


def test_with_a_limit_documents_count(tmp_path):
    begin(tmp_path, [CorpusFile(path="c.jsonl", bytes=10_000)], limit=20)
    record(tmp_path, names(tmp_path)[0], rows=5)
    found = status(tmp_path)
    assert (found.share, found.parts_planned) == (0.25, None)


def test_label_sets(tiny, tmp_path):
    dataset = shutil.copytree(tiny, tmp_path / "d")
    manifest = load(dataset / "manifest.json", Manifest)
    found = status(dataset)
    assert (found.state, found.share, found.tokens) == ("complete", 1.0, manifest.tokens)
    assert [(labels.name, labels.complete) for labels in found.labels] == [("lacy", True)]
    shutil.copytree(dataset / "labels/lacy", dataset / "labels/broken")
    (dataset / "labels/broken/_policy.json").unlink()
    policy = json.loads((dataset / "labels/lacy/_policy.json").read_text())
    (dataset / "labels/lacy/_policy.json").write_text(json.dumps(policy | {"parts": policy["parts"][1:]}))
    found = status(dataset)
    assert [(labels.name, labels.complete) for labels in found.labels] == [("broken", False), ("lacy", False)]


def test_the_command(folder, tiny, tmp_path, labeller):
    record(folder, names(folder)[0], 5)
    done = labeller("status", folder)
    assert done.returncode == 0 and "running, 10.0% done" in done.stdout and "1 of 10" in done.stdout
    done = labeller("status", tiny, "--watch", 1)  # a complete one ends it
    assert done.returncode == 0 and done.stdout.startswith("complete, ") and done.stdout.count("\n") == 1
    done = labeller("status", tiny, "--json")
    assert json.loads(done.stdout)["labels"][0]["name"] == "lacy"
    done = labeller("status", tmp_path)
    assert done.returncode == 0 and done.stdout == f"{tmp_path}: no run has begun here: there is no manifest.json\n"


def test_progress_comes_from_the_records_of_the_dataset(tmp_path):
    def finish(name: str) -> None:
        fields = {"source": "a", "rows": 2, "tokens": 10, "factual": 0, "bytes": 1, "sha256": "", "bad": 1}
        save(record_path(tmp_path, name), PartRecord(name=name, **fields))

    finish("part-00000-000000000000000")
    bytes_of = {"part-00000-000000000001000": 1000, "part-00000-000000000002000": 500}
    count = counter(tmp_path, {"part-00000-000000000000000"}, bytes_of)
    assert count() == Counts()
    finish("part-00000-000000000001000")
    write_atomic(tmp_path / ".spool" / "part-00001-000000000000000.jsonl", b"")
    assert count() == Counts(documents=2, tokens=10, bad=1, parts=1, bytes=1000, planned_parts=1)
    finish("part-00001-000000000000000")
    (tmp_path / ".spool" / "part-00001-000000000000000.jsonl").unlink()
    assert count() == Counts(documents=4, tokens=20, bad=2, parts=2, bytes=1000, planned_parts=1)
