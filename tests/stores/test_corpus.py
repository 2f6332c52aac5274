"""Corpora in stores: the same documents as from a folder, for few requests, whatever the network does."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lacy.pipeline.corpus import readers, spool
from lacy.pipeline.corpus.readers import CopyGoneError, read
from lacy.pipeline.corpus.sources import Range, find_files, plan_parts
from lacy.schemas import files
from lacy.schemas.errors import CorpusError, DatasetError
from lacy.schemas.manifest import at
from tests.stores.proxy import KINDS
from tests.support import corpora


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.01)


@pytest.fixture
def quiet(store):
    store.proxy.every(0)
    store.proxy.requests.clear()


def upload(store, folder, url):
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def read_all(argument, part_bytes, dataset):
    found = []
    for item in plan_parts(find_files([str(argument)]), part_bytes):
        for part in [item] if isinstance(item, Range) else spool.spool(item, dataset, part_bytes, set()):
            documents = read(part)
            ids = [doc_id.removeprefix(str(argument)) for doc_id in documents.ids]
            bad = [(letter.position, letter.reason, letter.doc_id) for letter in documents.bad]
            found.append((part.name, ids, documents.texts, bad, documents.skipped))
    return found


def test_the_documents_of_the_folder(store, quiet, tmp_path):
    corpus, url = tmp_path / "corpus", store.new()
    for number, suffix in enumerate((".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".parquet")):
        corpora.write(corpus / f"{number}{suffix}", corpora.documents(30, seed=number))
    (corpus / "9.txt").write_text("one document")
    whole = (corpus / "1.jsonl.gz").read_bytes()
    (corpus / "5.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (corpus / "6.jsonl").write_bytes(b"no JSON\n")
    (corpus / "7.jsonl").write_bytes(b"")
    (corpus / "8.parquet").write_bytes(b"no Parquet")
    upload(store, corpus, url)
    here = read_all(corpus, 4000, tmp_path / "d")
    assert sum(len(ids) for _, ids, *_ in here) > 150 and sum(len(part[3]) for part in here) == 3
    store.proxy.every(6)
    assert read_all(url, 4000, at(f"{store.new()}/d")) == here
    assert store.proxy.faults() == set(KINDS)


def test_files_are_found(store, quiet):
    url = store.new()
    for name in ("a.jsonl", "b/c.jsonl.gz", "b/d e.txt", ".hidden/x.jsonl", "b/.x.jsonl", "b/notes.md"):
        store.put(f"{url}/{name}", name.encode())

    def found(*arguments):
        return [(file.path.removeprefix(f"{url}/"), file.bytes) for file in find_files(arguments)]

    assert found(url) == [("a.jsonl", 7), ("b/c.jsonl.gz", 12), ("b/d e.txt", 9)]
    assert found(f"{url}/") == found(url)
    assert found(f"{url}/b/*.gz") == [("b/c.jsonl.gz", 12)]
    assert found(f"{url}/a.jsonl", f"{url}/*.jsonl") == [("a.jsonl", 7)]
    for argument, message in (
        (f"{url}/*.parquet", "no file matches"),
        (f"{url}/b/notes.md", "no file of a known kind"),
        (url.replace("bucket", "nowhere"), "no file matches"),
    ):
        with pytest.raises(CorpusError, match=message):
            found(argument)


def test_a_range_costs_a_request(store, quiet):
    rows = [{"id": str(number), "text": "word " * 2000} for number in range(600)]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    url = store.put(f"{store.new()}/c.jsonl", data)
    parts = plan_parts(find_files([url]), 1 << 20)
    store.proxy.requests.clear()
    ids = [doc_id for part in parts for doc_id in read(part).ids]
    assert ids == [row["id"] for row in rows]
    assert len(store.proxy.requests) <= len(parts) + 1  # one may come again where an idle connection was closed
    assert sum(request.bytes for request in store.proxy.requests) < len(data) + len(parts) * (readers.TAIL + 2)


def test_a_row_group_costs_few_requests(store, quiet, tmp_path):
    rows = [{"id": str(number), "text": f"{number} word " * 2000, "other": "x" * 5000} for number in range(400)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=100, compression="none")
    url = store.put(f"{store.new()}/c.parquet", (tmp_path / "c.parquet").read_bytes())
    parts = plan_parts(find_files([url]), 2 << 20)
    for part in parts:
        store.proxy.requests.clear()
        assert read(part).ids
        assert len(store.proxy.requests) <= 7  # its size, its footer, and two columns of at most two row groups
    text = sum(len(row["text"]) for row in rows)
    assert sum(request.bytes for request in store.proxy.requests) < 0.6 * text


def test_a_copy_that_is_gone_makes_no_dead_letter(store):
    """Another run has labelled it, or this one does when it is run again."""
    url = store.new()
    with pytest.raises(CopyGoneError, match="is gone: rerun the same command"):
        read(Range("part-x", url, f"{url}.gone", "jsonl", 0, 10))


def test_a_store_that_is_down_makes_no_dead_letters(s3, monkeypatch):
    """Nothing is known about the documents then: the run fails, and finds them when it is run again."""
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    url = s3.put(f"{s3.new()}/c.jsonl", corpora.jsonl(corpora.documents(3)))
    (part,) = plan_parts(find_files([url]), 1 << 20)
    s3.proxy.fault = lambda method, path: "reset"
    with pytest.raises(DatasetError, match="cannot be reached"):
        read(part)
    with pytest.raises(CorpusError, match="cannot be reached"):
        find_files([url])
    s3.proxy.every(0)
    assert len(read(part).ids) == 3


def test_a_file_that_was_removed_is_a_dead_letter(store, quiet):
    url = store.put(f"{store.new()}/c.jsonl", corpora.jsonl(corpora.documents(30)))
    parts = plan_parts(find_files([url]), 2000)
    store.direct.rm(url.split("://")[1])
    assert [len(read(part).bad) for part in parts] == [1] + [0] * (len(parts) - 1)
