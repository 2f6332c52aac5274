"""The knowledge source: what is found, where it is read from, and when its index is made anew."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lacy.cascade.evaluation.knowledge import Knowledge, cut, open_knowledge
from lacy.schemas.errors import CascadeError, DatasetError
from lacy.schemas.files import sha256, write_atomic
from lacy.schemas.manifest import Manifest, PartRecord, save, signals_path
from lacy.schemas.parts import SIGNALS, select, to_parquet

VENN = (
    "Odra Venn\n\n"
    "Odra Venn was a Lumerian botanist. She was born in Port Hale in 1871.\n"
    "Venn wrote fourteen books on moss."
)
PAGES = [
    {"id": "1", "text": VENN},
    {"id": "2", "text": "Port Hale\n\nPort Hale is a harbour town on the Sarn. Glaziers and a botanist lived there."},
    {"id": "3", "title": "Jost Werrel", "text": "He built the bridge over the Sarn in 1902, and a lighthouse."},
    {"id": "4", "text": "The Café Ōsaka 🌉 in Teverin serves moss tea."},
]


def write_jsonl(path: Path, pages: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(page) + "\n" for page in pages).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def write_dataset(folder: Path, pages: list[dict[str, str]], *, text: bool = True) -> Path:
    """A dataset of one part with no more than what is read here, tokens left empty."""
    schema = select(SIGNALS, ["text"] if text else [])
    rows = [{"doc_id": page["id"], "source": "c.jsonl:0", "text": page["text"]} for page in pages]
    lists: dict[str, list[int]] = {field.name: [] for field in schema if pa.types.is_list(field.type)}
    data = to_parquet(pa.Table.from_pylist([row | lists for row in rows], schema))
    write_atomic(signals_path(folder, "part-0"), data)
    record = PartRecord(
        name="part-0", source="c", rows=len(rows), tokens=0, factual=0, bad=0, bytes=data.size, sha256=sha256(data)
    )
    manifest = Manifest(
        state="complete",
        corpus=[],
        options={},
        tokenizer={},
        models={},
        versions={},
        documents=len(rows),
        parts=[record],
    )
    save(folder / "manifest.json", manifest)
    return folder


@pytest.fixture
def knowledge(tmp_path: Path) -> Knowledge:
    return open_knowledge(write_jsonl(tmp_path / "pages.jsonl", PAGES), tmp_path / "cache", words=8)


def ids(knowledge: Knowledge, query: str, k: int = 5, title: str | None = None) -> list[str]:
    (found,) = knowledge.search([query], k, title)
    return [passage.id for passage in found]


def test_the_passage_that_tells_is_found(knowledge: Knowledge) -> None:
    assert ids(knowledge, "Who kept a lighthouse?") == ["3:1"]
    assert ids(knowledge, "fourteen BOOKS", 1) == ["1:2"]
    assert ids(knowledge, "quasar") == ids(knowledge, "") == ids(knowledge, "the of and") == []
    (best, *_), (other, *_) = knowledge.search(["harbour town", "the bridge"], 2)
    assert (best.id, best.title, best.text) == ("2:0", "Port Hale", "Port Hale\n\nPort Hale is a harbour town")
    assert other.title == "Jost Werrel"


def test_a_subject_with_a_page_is_looked_up_there_alone(knowledge: Knowledge) -> None:
    assert "2:1" in ids(knowledge, "botanist born in Port Hale")
    assert ids(knowledge, "botanist born in Port Hale", title="odra_venn ") == ["1:1", "1:0", "1:2"]
    assert ids(knowledge, "quasar", 2, "Odra Venn") == ["1:0", "1:1"]
    assert ids(knowledge, "lighthouse", title="Mira Oldan") == ["3:1"]
    assert knowledge.pages("Odra Venn") == [(0, 3)]
    assert knowledge.pages("Odra") == []
    assert knowledge.pages("JOST WERREL") != []


def test_pages_of_one_title_are_searched_together(tmp_path: Path) -> None:
    pages = [{"id": str(i), "title": "Sarn" if i % 2 else "Oldan", "text": f"river {i}"} for i in range(6)]
    knowledge = open_knowledge(write_jsonl(tmp_path / "p.jsonl", pages), tmp_path)
    assert knowledge.pages("Sarn") == [(1, 2), (3, 4), (5, 6)]
    assert ids(knowledge, "river 5", 2, "Sarn") == ["5:0", "1:0"]


def test_equally_near_ones_come_in_order(tmp_path: Path) -> None:
    pages = [
        {"id": str(i), "title": f"t{i}", "text": "Moss grows." if i % 3 else "Moss grows, and ferns."}
        for i in range(60)
    ]
    knowledge = open_knowledge(write_jsonl(tmp_path / "p.jsonl", pages), tmp_path)
    assert ids(knowledge, "moss", 5) == ["1:0", "2:0", "4:0", "5:0", "7:0"]
    everything = ids(knowledge, "moss", 100)
    assert len(everything) == 60
    assert ids(knowledge, "moss", 41) == everything[:41]


def test_words_are_found_however_they_are_written(knowledge: Knowledge) -> None:
    assert ids(knowledge, "CAFE\u0301 o\u0304saka") == ["4:0"]
    (found,) = knowledge.search(["Teverin"], 1)
    assert found[0].text == "The Café Ōsaka 🌉 in Teverin serves moss"
    assert found[0].title == "4"


def test_scores_are_those_of_bm25s(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(40)]
    random = np.random.default_rng(0)
    pages = [
        {"id": str(i), "title": f"page {i // 2}", "text": " ".join(random.choice(words, random.integers(1, 60)))}
        for i in range(50)
    ]
    knowledge = open_knowledge(write_jsonl(tmp_path / "p.jsonl", pages), tmp_path, words=7)
    (folder,) = tmp_path.glob("index-*")
    reference = bm25s.BM25.load(folder)
    for query in (["w1", "w2", "w3"], ["w7"], ["page", "w30", "w31", "w32", "w33"]):
        scores = reference.get_scores(query)
        terms = [reference.vocab_dict[word] for word in query]
        for page in range(25):
            for span in knowledge.pages(f"page {page}"):
                np.testing.assert_array_equal(knowledge._scores_within(terms, *span), scores[slice(*span)])
        best = knowledge.search([" ".join(query)], 10)[0]
        rows = np.argsort(-scores, kind="stable")[:10]
        assert [passage.id for passage in best] == [knowledge._passage(int(row)).id for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "dataset", "folder"])
def test_every_source_gives_the_same_passages(tmp_path: Path, suffix: str, knowledge: Knowledge) -> None:
    source = tmp_path / "source" / f"pages{suffix}"
    pages = [page for page in PAGES if "title" not in page]
    if suffix == "dataset":
        write_dataset(source, pages)
    elif suffix == "folder":
        for number, page in enumerate(pages):
            write_jsonl(source / f"{number}.jsonl.gz", [page])
        (source / "notes.txt").write_text("not read")
    elif suffix == ".parquet":
        source.parent.mkdir()
        pq.write_table(pa.Table.from_pylist([*pages, {"id": "9", "text": None}, {"id": "8", "text": " \n"}]), source)
    else:
        write_jsonl(source, [*pages, {"id": "9", "text": ""}])
    told: list[tuple[int, int]] = []
    found = open_knowledge(source, tmp_path / "other", words=8, tell=lambda done, total: told.append((done, total)))
    count = 3 if suffix == "folder" else 1
    assert told == [(number, count) for number in range(1, count + 1)]
    assert found.documents == 3
    assert ids(found, "moss", 9) == ids(knowledge, "moss", 9)
    assert ids(found, "born", 9, "Odra Venn") == ids(knowledge, "born", 9, "Odra Venn")


def test_an_index_is_made_once(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", PAGES)
    first = open_knowledge(source, tmp_path / "cache")
    made = [0]

    def tell(done: int, total: int) -> None:
        made[0] += 1

    again = open_knowledge(source, tmp_path / "cache", tell=tell)
    assert made == [0]
    for query in ("moss", "Sarn harbour", "botanist 1871"):
        assert again.search([query], 3) == first.search([query], 3)
    open_knowledge(source, tmp_path / "cache", words=9, tell=tell)
    write_jsonl(source, PAGES[:3])
    assert open_knowledge(source, tmp_path / "cache", tell=tell).documents == 3
    assert made == [2]
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_only_the_pages_that_are_named_are_indexed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", PAGES)
    found = open_knowledge(source, tmp_path / "cache", titles=["PORT HALE", "Mira Oldan"])
    assert (found.documents, ids(found, "Sarn")) == (1, ["2:0"])
    assert open_knowledge(source, tmp_path / "cache").documents == 4
    assert open_knowledge(source, tmp_path / "cache", titles=["Port_Hale", "Mira Oldan", "Odra Venn"]).documents == 2
    for nobody in ([], ["Mira Oldan"]):
        with pytest.raises(CascadeError, match=f"has no text on any of the {len(nobody)} subjects"):
            open_knowledge(source, tmp_path / "cache", titles=nobody)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [shorten, flip, Path.unlink])
@pytest.mark.parametrize(
    "name", ["index.json", "passages.arrow", "titles.npy", "data.csc.index.npy", "vocab.index.json"]
)
def test_a_damaged_index_is_made_anew(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", PAGES)
    expected = open_knowledge(source, tmp_path / "cache").search(["moss"], 3)
    (folder,) = (tmp_path / "cache").iterdir()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    if name == "index.json" and damage is not Path.unlink:
        (folder / name).write_bytes(b"{")
    else:
        damage(folder / name)
    assert open_knowledge(source, tmp_path / "cache").search(["moss"], 3) == expected
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_no_index_holds_a_pickle(tmp_path: Path, knowledge: Knowledge) -> None:
    (folder,) = (tmp_path / "cache").iterdir()
    arrays = list(folder.glob("*.npy"))
    assert len(arrays) >= 4
    for path in arrays:
        np.load(path, allow_pickle=False)
    assert {path.suffix for path in folder.iterdir()} == {".npy", ".json", ".arrow"}


BAD = {
    "no JSON": (b'{"id": "1", "text": "a"}\nno\n', r"p\.jsonl:2: the line is not a JSON object"),
    "a list": (b"[1]\n", "not a JSON object"),
    "deep": (b"[" * 100_000, "not a JSON object"),
    "no UTF-8": (b'{"text": "\xff"}\n', "not a JSON object"),
    "a number": (b'{"text": 1}\n', "text is not a string"),
    "half a character": (b'{"text": "\\ud800"}\n', "lone surrogate"),
    "nothing": (b"", "has no text: use a corpus"),
    "blank": (b'{"text": " "}\n{"id": "1"}\n', "has no text: use a corpus"),
    "no words": (b'{"title": "...", "text": "?!"}\n', "has no text: use a corpus"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_one_line(tmp_path: Path, case: str) -> None:
    content, says = BAD[case]
    source = tmp_path / "p.jsonl"
    source.write_bytes(content)
    with pytest.raises(CascadeError, match=says) as error:
        open_knowledge(source, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    for name, content in (("a.jsonl.gz", b"no"), ("b.jsonl.zst", b"no"), ("c.parquet", b"no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CascadeError, match=f"{name} cannot be read"):
            open_knowledge(tmp_path / name, tmp_path / "cache")
    pq.write_table(pa.table({"title": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(CascadeError, match="has no column text: it has title"):
        open_knowledge(tmp_path / "d.parquet", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere", "notes.txt"):
        with pytest.raises(CascadeError, match="is not a knowledge source"):
            open_knowledge(tmp_path / missing, tmp_path / "cache")
    with pytest.raises(ValueError, match="at least one word"):
        open_knowledge(tmp_path / "d.parquet", tmp_path / "cache", words=0)
    (tmp_path / "file").write_bytes(b"")
    source = write_jsonl(tmp_path / "p.jsonl", PAGES)
    with pytest.raises(CascadeError, match="no index of"):
        open_knowledge(source, tmp_path / "file")


def test_datasets_are_checked_as_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="labelled with --no-text"):
        open_knowledge(write_dataset(tmp_path / "a", PAGES, text=False), tmp_path / "cache")
    damaged = write_dataset(tmp_path / "b", PAGES)
    flip(signals_path(damaged, "part-0"))
    with pytest.raises(CascadeError, match="not the file that was written"):
        open_knowledge(damaged, tmp_path / "cache")
    (damaged / "manifest.json").write_text("{}")
    with pytest.raises(DatasetError):
        open_knowledge(damaged, tmp_path / "cache")


@given(st.text("ab .\n東", max_size=400), st.integers(1, 9))
def test_passages_hold_every_word_once(text: str, words: int) -> None:
    passages = cut(text, words)
    assert "".join("".join(passages).split()) == "".join(text.split())
    if all(len(word) <= 32 for word in text.split()):
        assert [len(passage.split()) for passage in passages[:-1]] == [words] * (len(passages) - 1)
        assert " ".join(passages).split() == text.split()


def test_a_run_without_spaces_is_cut() -> None:
    assert [len(passage) for passage in cut("東" * 100, 2)] == [64, 36]
    assert cut("", 5) == cut(" \n", 5) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", PAGES)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(CascadeError, match=r"pip install 'lacy\[eval\]'"):
        open_knowledge(source, tmp_path / "cache")
