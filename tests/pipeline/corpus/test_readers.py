"""Every format, however it is cut into ranges, gives the same documents, each once; bad records are told apart."""

import bz2
import gzip
import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacy.pipeline.corpus import readers, spool
from lacy.pipeline.corpus.deadletters import REASONS, Code, dead_letter, fault
from lacy.pipeline.corpus.readers import read
from lacy.pipeline.corpus.sources import Range, Stream, default_part_bytes, find_files, kind_of, plan_parts
from lacy.schemas.errors import CorpusError
from tests.support import corpora


def read_all(corpus, part_bytes, folder):
    """All documents of a corpus through its plan: (ids, texts, bad)."""
    ids, texts, bad, names = [], [], [], []
    for item in plan_parts(find_files([str(corpus)]), part_bytes):
        for part in [item] if isinstance(item, Range) else spool.spool(item, folder, part_bytes, set()):
            documents = read(part)
            ids += documents.ids
            texts += documents.texts
            bad += documents.bad
            names.append(part.name)
    assert len(set(names)) == len(names) and names == sorted(names)
    return ids, texts, bad


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".parquet"])
@pytest.mark.parametrize("part_bytes", [1024, 5000, 1 << 20])
def test_formats_and_cuts(tmp_path, suffix, part_bytes):
    rows = corpora.documents(60, seed=3)
    corpora.write(tmp_path / f"c{suffix}", rows)
    ids, texts, bad = read_all(tmp_path / f"c{suffix}", part_bytes, tmp_path / "out")
    assert ids == [row["id"] for row in rows]
    assert texts == [row["text"] for row in rows]
    assert bad == []


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80), max_size=12), st.data())
@settings(max_examples=60)
def test_ranges_of_any_size_partition_the_lines(tmp_path_factory, texts, data):
    path = tmp_path_factory.mktemp("lines") / "c.jsonl"
    path.write_bytes(corpora.jsonl([{"id": str(number), "text": text} for number, text in enumerate(texts)]))
    size = path.stat().st_size
    inner = data.draw(st.lists(st.integers(1, max(1, size)), max_size=6, unique=True))
    edges = sorted({0, size, *(edge for edge in inner if edge < size)})
    pairs = list(pairwise(edges)) or [(0, 0)]
    seen = []
    for start, end in pairs:
        documents = read(Range(f"part-{start}", str(path), str(path), "jsonl", start, end))
        seen += documents.ids + [bad.doc_id for bad in documents.bad]
    assert sorted(seen, key=int) == [str(number) for number in range(len(texts))]


def test_text_survives_byte_for_byte(tmp_path):
    texts = [
        "a\r\nb",
        " lead and trail \n",
        "nul\x00",
        "\ufeffbom",
        "tab\t\u2028line\u2029",
        "e\u0301 \U0001f469\u200d\U0001f467",
    ]
    corpora.write(tmp_path / "c.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(texts)])
    corpora.write(tmp_path / "c.parquet", [{"id": str(n), "text": text} for n, text in enumerate(texts)])
    for name in ("c.jsonl", "c.parquet"):
        assert read_all(tmp_path / name, 1024, tmp_path)[1] == texts
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfbom\r\n\x00")
    assert read_all(tmp_path / "one.txt", 1024, tmp_path)[1] == ["\ufeffbom\r\n\x00"]


def test_a_dump_is_cut_at_pages(tmp_path):
    pages = [
        (str(n), f"Page {n}", f"'''Page {n}''' is [[a]] thing & so on.\n\n" + "More of it. " * n) for n in range(40)
    ]
    pages[7] = ("7", "Old name", "#REDIRECT [[Page 8]]")
    data = corpora.dump(pages)
    (tmp_path / "d.xml").write_bytes(data)
    (tmp_path / "d.xml.bz2").write_bytes(bz2.compress(data))
    expected = [str(n) for n in range(40) if n != 7]
    for name in ("d.xml", "d.xml.bz2"):
        for part_bytes in (1024, 3000, 1 << 20):
            ids, texts, bad = read_all(tmp_path / name, part_bytes, tmp_path / f"{name}{part_bytes}")
            assert (ids, bad) == (expected, [])
            assert texts[0].startswith("Page 0\n\nPage 0 is a thing & so on.")


def test_positions_in_a_stream_are_those_of_the_plain_file(tmp_path):
    rows = corpora.documents(30)
    plain, packed = corpora.write(tmp_path / "c.jsonl", rows), corpora.write(tmp_path / "d.jsonl.gz", rows)

    def places(path):
        found = []
        for item in plan_parts(find_files([str(path)]), 2000):
            for part in [item] if isinstance(item, Range) else spool.spool(item, tmp_path / "s", 2000, set()):
                found += [source.rpartition(":")[2] for source in read(part).sources]
        return found

    assert places(plain) == places(packed)


BAD_LINES = {
    b"{not json": "not JSON",
    b"[1, 2]": "an array, not an object",
    b'"text"': "not an object",
    b'{"id": "a"}': "no text",
    b'{"id": "a", "text": null}': "no text",
    b'{"id": "a", "text": 5}': "a number, not a string",
    b'{"id": "a", "text": ["x"]}': "an array, not a string",
    b'{"id": "a", "text": ""}': "empty",
    b'{"id": "a", "text": " \\n\\t"}': "empty",
    b'{"id": "a", "text": "\\ud800"}': "lone surrogate",
    b'{"id": "\\udfff", "text": "x"}': "lone surrogate",
    b'{"id": {"a": 1}, "text": "x"}': "id is an object",
    b'{"id": "", "text": "x"}': "id is empty",
    b'{"id": true, "text": "x"}': "id is true or false",
    b'{"id": "a", "text": "\xff\xfe"}': "not valid UTF-8 at byte 21",
    b"[" * 100_000: "nested too deep",
}


def test_bad_lines_have_reasons_and_positions(tmp_path):
    path = tmp_path / "c.jsonl"
    good = b'{"id": "good", "text": "fine"}'
    lines = [line for bad in BAD_LINES for line in (bad, good)]
    path.write_bytes(b"\n".join(lines) + b"\n\n  \n")
    documents = read(Range("part", str(path), str(path), "jsonl", 0, path.stat().st_size))
    assert len(documents.ids) == len(BAD_LINES)
    assert len(documents.bad) == len(BAD_LINES)
    data = path.read_bytes()
    for (line, reason), bad in zip(BAD_LINES.items(), documents.bad, strict=True):
        assert reason in bad.reason, (line[:40], bad)
        assert data[bad.position :].startswith(line)
        assert len(bad.reason) < 200 and "\n" not in bad.reason


def test_numbers_and_missing_ids(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"id": 12, "text": "a"}\n{"text": "b"}\n')
    documents = read(Range("part", "c.jsonl", str(path), "jsonl", 0, 100))
    assert documents.ids == ["12", "c.jsonl:24"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl.bz2"])
def test_a_truncated_stream_keeps_what_came_before(tmp_path, suffix):
    rows = corpora.documents(3000, seed=1)
    path = corpora.write(tmp_path / f"c{suffix}", rows)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    ids, texts, bad = read_all(path, 1 << 16, tmp_path / "out")
    assert ids == [row["id"] for row in rows[: len(ids)]] and texts == [row["text"] for row in rows[: len(ids)]]
    assert 0 < len(ids) < len(rows)
    assert len(bad) == 1 and "breaks off" in bad[0].reason
    assert bad[0].position == len(corpora.jsonl(rows[: len(ids)]))


def test_a_stream_that_is_none(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.jsonl.bz2", "d.txt.gz"):
        (tmp_path / name).write_bytes(b"this is not compressed at all")
        ids, _, bad = read_all(tmp_path / name, 1024, tmp_path / name.replace(".", ""))
        assert ids == [] and len(bad) == 1 and bad[0].position == 0


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo " * 1000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    _, texts, bad = read_all(tmp_path, 1024, tmp_path / ".out")
    assert texts == ["one\n\ntwo " * 1000, "three"]
    assert [letter.reason for letter in bad] == ["not valid UTF-8 at byte 3"]


def test_damaged_parquet(tmp_path):
    rows = corpora.documents(400)
    path = corpora.write(tmp_path / "c.parquet", rows)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    ids, _, bad = read_all(path, 2000, tmp_path)
    assert ids == [] and len(bad) == 1 and "cannot read" in bad[0].reason
    pq.write_table(pa.table({"id": ["a"], "body": ["x"]}), tmp_path / "d.parquet")
    _, _, bad = read_all(tmp_path / "d.parquet", 1024, tmp_path)
    assert len(bad) == 1 and "no column text (columns: body, id)" in bad[0].reason


def test_parquet_text_of_another_type_or_encoding(tmp_path):
    pq.write_table(pa.table({"text": pa.array([1, None], pa.int64())}), tmp_path / "n.parquet")
    _, _, bad = read_all(tmp_path / "n.parquet", 1024, tmp_path)
    assert [letter.reason for letter in bad] == ["text is a number, not a string", "no text"]
    raw = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ["a", "b"], "text": raw}), tmp_path / "u.parquet")
    ids, _, bad = read_all(tmp_path / "u.parquet", 1024, tmp_path)
    assert ids == ["a"] and [letter.reason for letter in bad] == ["not valid UTF-8 at byte 0 of the text"]


def test_a_file_that_cannot_be_opened_is_one_bad_record(tmp_path):
    path = corpora.write(tmp_path / "c.jsonl", corpora.documents(50))
    planned = plan_parts(find_files([str(path)]), 1024)
    path.unlink()
    path.mkdir()
    bad = [letter for part in planned for letter in read(part).bad]
    assert len(planned) > 3 and len(bad) == 1 and bad[0].position == 0 and "cannot read" in bad[0].reason


def test_a_record_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 1 << 21)
    rows = [{"id": "a", "text": "x"}, {"id": "b", "text": "y" * (5 << 20)}, {"id": "c", "text": "z"}]
    for name in ("c.jsonl", "c.jsonl.gz"):
        corpora.write(tmp_path / name, rows)
        ids, texts, bad = read_all(tmp_path / name, 1 << 20, tmp_path / name.replace(".", ""))
        assert (ids, texts) == (["a", "c"], ["x", "z"])
        assert len(bad) == 1 and "longer than" in bad[0].reason and bad[0].position == len(corpora.jsonl(rows[:1]))


def test_a_limit_counts_documents(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"bad\n" + corpora.jsonl(corpora.documents(5)))
    documents = read(Range("p", str(path), str(path), "jsonl", 0, path.stat().st_size, limit=2))
    assert len(documents.ids) == 2 and len(documents.bad) == 1


def test_find_files(tmp_path):
    for name in ("b/x.jsonl", "a.parquet", "b/notes.md", ".hidden/y.jsonl", "b/.z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    found = find_files([str(tmp_path), str(tmp_path / "b" / "*.jsonl")])
    assert [(file.path, file.bytes) for file in found] == [
        (str(tmp_path / "a.parquet"), 5),
        (str(tmp_path / "b" / "x.jsonl"), 5),
    ]
    with pytest.raises(CorpusError, match="no file matches"):
        find_files([str(tmp_path / "none*.jsonl")])
    with pytest.raises(CorpusError, match=r"notes\.md has no file of a known kind: .*\.jsonl"):
        find_files([str(tmp_path / "b" / "notes.md")])


def test_planning_reads_nothing_and_small_corpora_have_parts_too(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"x" * 10_000_000)
    files = find_files([str(path)])
    assert default_part_bytes(files) == 10_000_000 // 64
    path.unlink()
    parts = plan_parts(files, default_part_bytes(files))
    assert len(parts) == 64 and all(isinstance(part, Range) for part in parts)
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert parts[-1].end == 10_000_000


def test_a_stream_is_cut_once(tmp_path, monkeypatch):
    path = corpora.write(tmp_path / "c.jsonl.gz", corpora.documents(80))
    stream = plan_parts(find_files([str(path)]), 2000)[0]
    assert isinstance(stream, Stream)
    ranges = spool.spool(stream, tmp_path, 2000, set())
    for part in ranges[:2]:
        spool.discard(tmp_path, part)
    done = {part.name for part in ranges[:2]}
    monkeypatch.setattr(spool, "cut", lambda *_: pytest.fail("cut again"))
    assert spool.spool(stream, tmp_path, 2000, done) == ranges
    monkeypatch.undo()
    assert spool.spool(stream, tmp_path, 2000, set()) == ranges  # a copy is missing: all are made again
    assert all((tmp_path / ".spool" / f"{part.name}.jsonl").exists() for part in ranges)


def test_dead_letters_are_json(tmp_path):
    from dataclasses import asdict

    bad = dead_letter("c.jsonl", 7, fault(Code.NOT_JSON, 'a "quoted" detail'), "id")
    assert json.loads(json.dumps(asdict(bad))) == {
        "source": "c.jsonl",
        "position": 7,
        "reason": 'not JSON: a "quoted" detail',
        "doc_id": "id",
        "code": "not_json",
    }


def test_each_code_has_a_reason():
    assert set(REASONS) == set(Code)


def test_kinds_by_suffix():
    assert kind_of("enwiki-latest-pages-articles1.xml-p1p41242.bz2") == ("xml", "bzip2")
    assert kind_of("enwiki-latest-pages-articles1.xml-p1p41242") == ("xml", "")
    assert kind_of("A.JSONL.GZ") == ("jsonl", "gzip")
    assert kind_of("a.parquet") == ("parquet", "")
    assert kind_of("a.parquet.gz") is None and kind_of("a.gz") is None and kind_of("a.md") is None
