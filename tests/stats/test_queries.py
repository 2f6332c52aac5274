"""The queries of docs/queries.md give what a plain computation gives."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lacy.schemas.codes import ENT_TYPES
from lacy.stats.connect import connect, require_reading
from tests.stats.conftest import corpus, write

PAGE = Path(__file__).parents[2] / "docs" / "queries.md"
QUERIES = re.findall(r"^```sql\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
DELEGATE = 1


@pytest.fixture(scope="module")
def many():
    return corpus(60)


@pytest.fixture(scope="module")
def answers(tmp_path_factory, many):
    """Rows as dicts, for each query."""
    with connect(write(tmp_path_factory.mktemp("queries") / "d", many)) as connection:
        found = []
        for sql in QUERIES:
            require_reading(sql)
            found.append(connection.sql(sql).to_arrow_table().to_pylist())
    return found


def tokens(documents):
    for doc in documents:
        for place in range(len(doc.spans)):
            signal = {name: values[place] for name, values in doc.signals.items()}
            yield doc, place, signal, doc.labels["lacy"][place]


def test_there_are_twelve_and_each_has_an_answer(answers):
    assert len(answers) == 12 and all(answers)


def test_sources(answers, many):
    counts, delegated = Counter(), Counter()
    for doc, _, _, label in tokens(many):
        counts[doc.source.rpartition(":")[0]] += 1
        delegated[doc.source.rpartition(":")[0]] += label == DELEGATE
    assert {row["file"]: (row["tokens"], row["delegated"]) for row in answers[0]} == {
        name: (count, pytest.approx(delegated[name] / count)) for name, count in counts.items()
    }


def test_words(answers, many):
    words = defaultdict(lambda: [0.0, False])
    for doc, place, signal, label in tokens(many):
        word, start = doc.word(place)
        if word is not None:
            words[doc.doc_id, start, word][0] += signal["ref_nll"] or 0.0
            words[doc.doc_id, start, word][1] |= label == DELEGATE
    delegated = Counter(word for (_, _, word), (_, chosen) in words.items() if chosen)
    expected = sorted(delegated.items(), key=lambda item: (-item[1], item[0].encode()))[:20]
    assert [(row["word"], row["delegated"]) for row in answers[1]] == expected
    first = answers[1][0]
    losses = [nll for (_, _, word), (nll, _) in words.items() if word == first["word"]]
    assert first["occurrences"] == len(losses) and first["mean_nll"] == pytest.approx(sum(losses) / len(losses))


def test_hard_tokens_kept(answers, many):
    kept = [
        (-signal["ref_nll"], doc.doc_id, place, doc.text[slice(*doc.spans[place])])
        for doc, place, signal, label in tokens(many)
        if label == 0 and signal["ref_nll"] is not None
    ]
    assert [(-row["ref_nll"], row["doc_id"], row["position"], row["token"]) for row in answers[2]] == sorted(kept)[:20]
    by_id = {doc.doc_id: doc for doc in many}
    for row in answers[2]:
        spans = by_id[row["doc_id"]].spans[max(0, row["position"] - 8) : row["position"]]
        assert (row["before"] or "") == "".join(by_id[row["doc_id"]].text[slice(*span)] for span in spans)


def test_label_sets_that_differ(answers, many):
    ((name, other),) = {(row["one"], row["other"]) for row in answers[3]}
    pairs = [pair for doc in many for pair in zip(doc.labels[name], doc.labels[other], strict=True)]
    (row,) = answers[3]
    assert row["differ"] == pytest.approx(sum(a != b for a, b in pairs) / len(pairs)) and row["differ"] > 0
    assert row["only_one"] == sum(bool(a and not b) for a, b in pairs)
    assert row["only_other"] == sum(bool(b and not a) for a, b in pairs)


def test_documents_that_give_away_most(answers, many):
    shares = [(-doc.labels["lacy"].count(DELEGATE) / len(doc.spans), doc.doc_id) for doc in many if len(doc.spans) > 49]
    found = [(-row["delegated"], row["doc_id"]) for row in answers[4]]
    assert found == [(pytest.approx(share), doc_id) for share, doc_id in sorted(shares)[:20]]


def test_entity_types(answers, many):
    factual = Counter((ENT_TYPES[s["ent_type"]] or "none", s["factual"]) for _, _, s, _ in tokens(many))
    for row in answers[5]:
        counts = factual[row["entity"], True], factual[row["entity"], False]
        assert row["tokens"] == sum(counts) and row["factual"] == pytest.approx(counts[0] / sum(counts))
    assert sum(row["tokens"] for row in answers[5]) == sum(len(doc.spans) for doc in many)


def test_losses_of_what_is_correct(answers, many):
    correct = defaultdict(list)
    for _, _, signal, _ in tokens(many):
        if signal["ref_nll"] is not None:
            correct[signal["ref_nll"] * 2 // 1 / 2].append(signal["ref_correct"])
    expected = [(nll, len(found), pytest.approx(sum(found) / len(found))) for nll, found in sorted(correct.items())]
    assert [tuple(row.values()) for row in answers[6]] == expected


def test_positions(answers, many):
    losses = defaultdict(list)
    for _, place, signal, _ in tokens(many):
        if place:
            losses[1 << (place.bit_length() - 1)].append(signal["ref_nll"])
    assert [(row["from_position"], row["tokens"], row["mean_nll"]) for row in answers[7]] == [
        (place, len(found), pytest.approx(sum(found) / len(found))) for place, found in sorted(losses.items())
    ]


def test_thresholds(answers, many):
    every = [signal for _, _, signal, _ in tokens(many)]
    for row in answers[8]:
        above = [signal for signal in every if (signal["ref_nll"] or 0) >= row["threshold"]]
        assert row["picked_by_loss_alone"] == pytest.approx(len(above) / len(every))
        assert row["picked"] == pytest.approx(sum(signal["factual"] for signal in above) / len(every))
    assert len(answers[8]) == 8


def test_one_document(answers, many):
    first = min(many, key=lambda doc: doc.doc_id.encode())
    assert [row["token"] for row in answers[9]] == [first.text[start:end] for start, end in first.spans]
    assert [row["label"] for row in answers[9]] == [("learn", "delegate")[code] for code in first.labels["lacy"]]


def test_parts(answers, many):
    """Each third part that `write` makes is empty, each second has a bad record."""
    found = {int(row["part"].split("-")[1]): row for row in answers[10]}
    last = max(int(doc.part.split("-")[1]) for doc in many)
    assert {number for number in range(last + 1) if number % 3 == 1 or number % 2 == 1} == found.keys() - {last}
    assert all((row["documents"] == 0) == (number % 3 == 1) for number, row in found.items())


def test_a_sample(answers, many):
    by_id = {doc.doc_id: doc for doc in many}
    assert 0 < len(answers[11]) < len(many) / 2
    for row in answers[11]:
        doc = by_id[row["doc_id"]]
        losses = [nll for nll in doc.signals["ref_nll"] if nll is not None]
        assert row["text"] == doc.text and row["mean_nll"] == pytest.approx(sum(losses) / len(losses))
