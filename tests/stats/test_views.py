import json
import sys
import time

import duckdb
import pytest

from lacy.schemas import views
from lacy.schemas.codes import ENT_TYPES, LABELS, POS
from lacy.schemas.errors import DatasetError
from lacy.schemas.manifest import signals_path
from lacy.stats.connect import connect
from tests.stats.conftest import document, write

TOKENS = (
    *("doc_id", "source", "part", "position", "token", "token_id", "token_start", "token_end", "word", "word_start"),
    *("factual", "pos", "ent_type", "ref_nll", "student_nll", "judge", "ref_correct"),
)


def expected_token(doc, place):
    start, end = doc.spans[place]
    signal = {name: values[place] for name, values in doc.signals.items()}
    return (
        *(
            doc.doc_id,
            doc.source,
            doc.part,
            place,
            doc.text[start:end],
            signal["token_ids"],
            start,
            end,
            *doc.word(place),
        ),
        *(signal["factual"], POS[signal["pos"]] or None, ENT_TYPES[signal["ent_type"]] or None),
        *(signal["ref_nll"], signal["student_nll"], signal["judge"], signal["ref_correct"]),
    )


def rows(dataset, sql, *parameters):
    with connect(dataset) as connection:
        return connection.execute(sql, parameters).fetchall()


def columns(dataset, view):
    with connect(dataset) as connection:
        return tuple(row[0] for row in connection.execute(f"DESCRIBE {view}").fetchall())


def test_tokens_equal_what_was_written(dataset, documents):
    assert columns(dataset, "tokens") == TOKENS
    expected = [expected_token(doc, place) for doc in documents for place in range(len(doc.spans))]
    assert sorted(rows(dataset, "FROM tokens"), key=lambda row: (row[0], row[3])) == sorted(
        expected, key=lambda row: (row[0], row[3])
    )


def test_labels_are_the_tokens_once_for_each_set(dataset, documents):
    assert columns(dataset, "labels") == ("labels", "label", *TOKENS)
    expected = [
        (name, LABELS[doc.labels[name][place]], *expected_token(doc, place))
        for doc in documents
        for name in doc.labels
        for place in range(len(doc.spans))
    ]
    assert {row[0] for row in expected} == {"lacy", "a 'quoted' set"}
    assert {row[1] for row in expected} == set(LABELS)
    key = lambda row: (row[0], row[2], row[5])  # noqa: E731
    assert sorted(rows(dataset, "FROM labels"), key=key) == sorted(expected, key=key)


def test_documents_add_up(dataset, documents):
    found = rows(
        dataset,
        "SELECT doc_id, source, part, text, characters, tokens, factual_tokens, scored_tokens, ref_nll, student_nll "
        "FROM documents",
    )
    scored = lambda doc, name: [nll for nll in doc.signals[name] if nll is not None]  # noqa: E731
    assert sorted(found) == sorted(
        (
            *(doc.doc_id, doc.source, doc.part, doc.text, len(doc.text), len(doc.spans)),
            *(sum(doc.signals["factual"]), len(scored(doc, "ref_nll"))),
            *(sum(scored(doc, "ref_nll")), sum(scored(doc, "student_nll"))),
        )
        for doc in documents
    )


def test_parts_are_those_of_the_manifest(dataset, documents):
    found = rows(dataset, "SELECT part, documents, tokens, factual_tokens, bytes, sha256 FROM parts ORDER BY part")
    assert sum(row[1] for row in found) == len(documents)
    assert sum(row[2] for row in found) == sum(len(doc.spans) for doc in documents)
    assert any(row[1] == 0 and row[4] == 0 for row in found), "no empty part"
    assert rows(dataset, "SELECT count(*) FROM parts ANTI JOIN documents USING (part)") == [
        (sum(row[1] == 0 for row in found),)
    ]


def test_what_is_left_out_is_null(bare):
    assert columns(bare, "tokens") == TOKENS
    counts = "count(token), count(word), count(word_start), count(student_nll), count(ref_correct)"
    assert rows(bare, f"SELECT {counts} FROM tokens") == [(0,) * 5]
    assert rows(bare, "SELECT count(text), count(characters), count(student_nll) FROM documents") == [(0, 0, 0)]
    ((tokens, ids, losses),) = rows(bare, "SELECT count(*), count(token_id), count(ref_nll) FROM tokens")
    assert tokens == ids > losses > 0


@pytest.mark.parametrize("kind", ["bare", "empty"])
def test_without_labels_the_view_is_empty(kind, request):
    dataset = request.getfixturevalue(kind)
    assert columns(dataset, "labels") == ("labels", "label", *TOKENS)
    assert rows(dataset, "FROM labels") == []


def test_types_do_not_depend_on_what_is_there(dataset, bare, empty):
    def types(dataset, view):
        with connect(dataset) as connection:
            return [row[:2] for row in connection.execute(f"DESCRIBE {view}").fetchall()]

    for view in views.NAMES:
        assert types(dataset, view) == types(bare, view) == types(empty, view)


def test_a_dataset_without_documents(empty):
    for view in views.NAMES:
        assert rows(empty, f"FROM {view}") == []


@pytest.mark.parametrize("width", [1, 63, 64, 65, 128, 129, 1000])
def test_tokens_and_words_of_any_length(tmp_path, width):
    """Around the width of the pieces that the text is cut in."""
    text = f"ä{'🦆' * width} b{' ' * width}c {'d' * width}\n{'é' * 63} {'f' * 64}, {'g' * 65} 🦆"
    spans = [(start, min(len(text), start + width)) for start in range(0, len(text), width)]
    docs = [document("wide", text, spans=spans), document("split", text)]
    write(tmp_path, docs)
    found = rows(tmp_path, "SELECT doc_id, position, token, word, word_start FROM tokens")
    assert sorted(found) == sorted(
        (doc.doc_id, place, doc.text[start:end], *doc.word(place))
        for doc in docs
        for place, (start, end) in enumerate(doc.spans)
    )


def test_a_token_without_characters(tmp_path):
    doc = document("d", "ab cd", spans=[(0, 0), (0, 2), (2, 2), (2, 5), (5, 5)])
    write(tmp_path, [doc])
    assert rows(tmp_path, "SELECT token, word FROM tokens ORDER BY position") == [
        *(("", None), ("ab", "ab"), ("", None), (" cd", "cd"), ("", None)),
    ]


def test_space_is_what_python_calls_space():
    with duckdb.connect() as connection:
        found = connection.execute(
            "SELECT code FROM range(1, ?) AS codes(code) "
            "WHERE code NOT BETWEEN 55296 AND 57343 AND regexp_matches(chr(code::INTEGER), ?)",
            [sys.maxunicode + 1, f"[{views._SPACE}]"],
        ).fetchall()
    assert [code for (code,) in found] == [code for code in range(1, sys.maxunicode + 1) if chr(code).isspace()]


def read_columns(dataset, sql):
    """The columns that a query reads of Parquet files, and the number of files."""
    with connect(dataset) as connection:
        plan = json.loads(connection.execute(f"EXPLAIN (ANALYZE, FORMAT json) {sql}").fetchone()[1])
    found, files, nodes = set(), 0, plan.get("operator") or plan["children"]
    while nodes:
        node = nodes.pop()
        nodes += node.get("children", [])
        extra = node.get("extra_info", {})
        if "Total Files Read" in extra:
            names = extra["Projections"]
            found.update([names] if isinstance(names, str) else names)
            files += int(extra["Total Files Read"])
    return found, files


def test_only_the_columns_asked_for_are_read(dataset):
    assert read_columns(dataset, "SELECT count(*) FROM tokens")[0] == {"factual"}
    assert read_columns(dataset, "SELECT sum(ref_nll) FROM tokens WHERE pos = 'NOUN'")[0] == {
        *("factual", "ref_nll", "pos"),
    }
    found, _ = read_columns(dataset, "SELECT label, avg(ref_nll) FROM labels WHERE labels = 'lacy' GROUP BY label")
    assert "text" not in found and "token_ids" not in found and {"label", "ref_nll", "doc_id"} <= found


def test_only_the_files_asked_for_are_read(dataset, documents):
    part = documents[0].part
    assert read_columns(dataset, f"SELECT count(*) FROM tokens WHERE part = '{part}'")[1] == 1
    one_set = f"SELECT count(label) FROM labels WHERE labels = 'lacy' AND part = '{part}'"
    assert read_columns(dataset, one_set)[1] == 2, "one of signals, one of labels"


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path):
    write(tmp_path, [document("a", "One goose.")])
    stray = write(tmp_path / "other", [document("b", "Another goose.")])
    part = rows(stray, "SELECT part FROM documents")[0][0]
    signals_path(stray, part).rename(signals_path(tmp_path, "part-99999-000000"))
    assert rows(tmp_path, "SELECT doc_id FROM documents") == [("a",)]


@pytest.mark.parametrize("width", [None, 80])
def test_a_long_document_is_not_quadratic(tmp_path, width):
    """A million characters, every eighth of four bytes. `substring` on the whole text takes minutes."""
    text = "ab🦆cd é " * 125_000
    spans = None if width is None else [(start, start + width) for start in range(0, len(text), width)]
    doc = document("long", text, spans=spans)
    write(tmp_path, [doc], sets={})
    with connect(tmp_path) as connection:
        started = time.process_time()
        (found,) = connection.execute("SELECT sum(length(token)), count(word) FROM tokens").fetchall()
        seconds = time.process_time() - started
    assert found == (sum(end - start for start, end in doc.spans), sum(not text[s:e].isspace() for s, e in doc.spans))
    assert seconds < 20


def test_a_missing_file_is_a_clear_error(tmp_path):
    doc = document("a", "One goose.")
    write(tmp_path, [doc])
    signals_path(tmp_path, doc.part).unlink()
    with pytest.raises(DatasetError, match="missing or damaged: run lacy check"):
        views.create_views(tmp_path)
