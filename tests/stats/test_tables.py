"""Every figure against a plain count over the values that the dataset was written from."""

import io
import json
import unicodedata
from collections import defaultdict

import pytest
from rich.cells import cell_len
from rich.console import Console

from schemas.codes import DELEGATE, ENT_TYPES, IGNORE, LEARN, POS
from schemas.manifest import DatasetError
from stats import tables
from stats.tables import compute, show
from tests.stats.conftest import by_loss, corpus, document, write


def mean(values):
    values = [value for value in values if value is not None]
    return pytest.approx(sum(values) / len(values)) if values else None


def chosen(doc, place, labels):
    return labels is not None and doc.labels[labels][place] != LEARN


def expected_kinds(documents, column, table, labels):
    groups = defaultdict(list)
    for doc in documents:
        for place, code in enumerate(doc.signals[column]):
            groups[table[code]].append((doc, place))
    found = []
    for name, members in groups.items():
        losses = [doc.signals["ref_nll"][place] for doc, place in members]
        found.append(
            {
                "name": name,
                "tokens": len(members),
                "factual": sum(doc.signals["factual"][place] for doc, place in members),
                "chosen": sum(chosen(doc, place, labels) for doc, place in members),
                "scored": sum(loss is not None for loss in losses),
                "nll": pytest.approx(sum(loss or 0 for loss in losses)),
                "mean_nll": mean(losses),
            }
        )
    return sorted(found, key=lambda kind: (-kind["tokens"], kind["name"]))


def expected_words(documents, labels):
    """(occurrences, chosen, all losses, losses of those kept) by word."""
    occurrences = defaultdict(list)
    for number, doc in enumerate(documents):
        for place in range(len(doc.spans)):
            word, start = doc.word(place)
            if word is not None:
                occurrences[number, start, word].append((doc.signals["ref_nll"][place], chosen(doc, place, labels)))
    words = defaultdict(lambda: [0, 0, [], []])
    for (_, _, word), members in occurrences.items():
        while word and unicodedata.category(word[0]).startswith("P"):
            word = word[1:]
        while word and unicodedata.category(word[-1]).startswith("P"):
            word = word[:-1]
        if not word:
            continue
        losses = [loss for loss, _ in members if loss is not None]
        loss, taken = sum(losses) if losses else None, any(flag for _, flag in members)
        words[word][0] += 1
        words[word][1] += taken
        words[word][2].append(loss)
        if not taken:
            words[word][3].append(loss)
    return words


def as_words(found):
    return [word.model_dump() for word in found]


def expected_word(word, occurrences, taken, losses, kept):
    return {
        "word": word,
        "occurrences": occurrences,
        "chosen": taken,
        "mean_nll": mean(losses),
        "mean_kept_nll": mean(kept),
    }


def quantile(values, share):
    """Linear between the two values around it."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return pytest.approx(values[low] + (values[high] - values[low]) * (place - low), rel=1e-6)


def test_totals_and_label_sets(dataset, documents):
    stats = compute(dataset)
    tokens = sum(len(doc.spans) for doc in documents)
    assert (stats.documents, stats.tokens) == (len(documents), tokens)
    assert stats.factual == sum(sum(doc.signals["factual"]) for doc in documents)
    assert stats.bad > 0 and stats.labels == "lacy" and stats.notes == []
    found = {labels.name: labels for labels in stats.label_sets}
    for name, labels in found.items():
        codes = [code for doc in documents for code in doc.labels[name]]
        assert labels.delegated == pytest.approx(codes.count(DELEGATE) / tokens)
        assert labels.ignored == pytest.approx(codes.count(IGNORE) / tokens)
        assert (labels.budget, labels.threshold, labels.policy) == (0.15, 6.0, "lacy")
    assert found.keys() == {"lacy", "a 'quoted' set"} and found["lacy"].delegated and found["a 'quoted' set"].ignored


@pytest.mark.parametrize("labels", ["lacy", "a 'quoted' set", None])
def test_kinds(dataset, bare, documents, labels):
    stats = compute(dataset if labels else bare, labels)
    for column, table in (("pos", POS), ("ent_type", ENT_TYPES)):
        expected = expected_kinds(documents, column, table, labels)
        assert [kind.model_dump() for kind in getattr(stats, column)] == expected
        assert len(expected) > tables.KINDS


@pytest.mark.parametrize("labels", ["lacy", "a 'quoted' set"])
def test_losses(dataset, documents, labels):
    stats = compute(dataset, labels)
    for name, flag in (("factual", True), ("other", False)):
        values = [
            nll
            for doc in documents
            for nll, factual in zip(doc.signals["ref_nll"], doc.signals["factual"], strict=True)
            if nll is not None and factual == flag
        ]
        assert getattr(stats.losses, name) == [quantile(values, share) for share in tables.QUANTILES]


@pytest.mark.parametrize("at_least", [1, 3])
@pytest.mark.parametrize("labels", ["lacy", "a 'quoted' set"])
def test_words(dataset, documents, labels, at_least, monkeypatch):
    monkeypatch.setattr(tables, "_rare", lambda tokens: at_least)
    stats = compute(dataset, labels)
    words = expected_words(documents, labels)
    often = sorted((word for word in words if words[word][1]), key=lambda word: (-words[word][1], word))
    assert as_words(stats.chosen_words) == [expected_word(word, *words[word]) for word in often[: tables.WORDS]]

    kept = {
        word: sum(losses) / len(losses)
        for word, (occurrences, taken, _, all_losses) in words.items()
        if occurrences - taken >= at_least and (losses := [loss for loss in all_losses if loss is not None])
    }
    highest = sorted(kept, key=lambda word: (-kept[word], word))
    assert as_words(stats.kept_words) == [expected_word(word, *words[word]) for word in highest[: tables.WORDS]]
    assert {"geese", "🦆🦆", "red]Not"} <= words.keys() and stats.kept_at_least == at_least


def test_the_label_set_looked_at(tmp_path):
    sets = {"zeta": by_loss(1.0), "alpha": by_loss(9.0)}
    write(tmp_path, corpus(3), sets=sets)
    assert compute(tmp_path).labels == "alpha"
    assert compute(tmp_path, "zeta").labels == "zeta"
    with pytest.raises(DatasetError, match="no label set 'lacy': it has alpha, zeta"):
        compute(tmp_path, "lacy")


def test_without_text_and_labels(bare):
    stats = compute(bare)
    assert stats.labels is None and stats.label_sets == []
    assert stats.chosen_words == stats.kept_words == []
    assert "without text" in stats.notes[0] and "without text" in printed(stats)
    assert "delegated" not in printed(stats)
    with pytest.raises(DatasetError, match="no label set 'lacy': lacy decide makes one"):
        compute(bare, "lacy")


def test_without_labels_words_are_listed(tmp_path):
    stats = compute(write(tmp_path, corpus(), sets={}))
    assert stats.chosen_words == [] and len(stats.kept_words) == tables.WORDS
    assert "Words with the highest mean loss" in printed(stats)


def test_without_losses(tmp_path):
    docs = corpus(3)
    for doc in docs:
        doc.signals["ref_nll"] = [None] * len(doc.spans)
    write(tmp_path, docs, sets={"factual": lambda doc, place: DELEGATE if doc.signals["factual"][place] else LEARN})
    stats = compute(tmp_path)
    assert stats.losses.factual == stats.losses.other == stats.kept_words == []
    assert stats.chosen_words and stats.chosen_words[0].mean_nll is None
    assert "without a reference model" in printed(stats) and "nats" not in printed(stats)


def test_without_documents(empty):
    stats = compute(empty)
    assert (stats.documents, stats.tokens, stats.pos) == (0, 0, [])
    assert "0 documents" in printed(stats)


def test_quantiles_of_a_large_dataset_are_estimated(dataset, monkeypatch):
    exact = compute(dataset).losses
    monkeypatch.setattr(tables, "EXACT_QUANTILES", 10)
    stats = compute(dataset)
    assert stats.losses.factual == pytest.approx(exact.factual, rel=0.1)
    assert "quantiles are estimated" in printed(stats)


def test_json(dataset):
    stats = compute(dataset)
    loaded = json.loads(stats.model_dump_json())
    assert loaded["pos"][0]["mean_nll"] == stats.pos[0].mean_nll
    assert loaded["chosen_words"][0]["word"] == stats.chosen_words[0].word


def printed(stats, **options):
    out = io.StringIO()
    show(stats, Console(**({"file": out, "width": 100} | options)))
    return out.getvalue()


def test_tables_fit(dataset):
    out = printed(compute(dataset))
    lines = out.splitlines()
    assert len(lines) <= 50
    assert max(map(cell_len, lines[1:])) <= 100
    assert "…" not in "".join(line for line in lines if not line.startswith(("very", "A word")))
    assert printed(compute(dataset), width=80) == out, "a file has room"
    narrow = printed(compute(dataset), width=80, force_terminal=True, color_system=None)
    assert max(map(cell_len, narrow.splitlines()[1:])) <= 80
    assert len(narrow.splitlines()) > len(lines)


def test_numbers_stand_under_each_other(dataset):
    lines = printed(compute(dataset, "lacy")).splitlines()
    (start,) = (place for place, line in enumerate(lines) if line.startswith("tokens "))
    heads, factual, other = lines[start : start + 3]
    assert len(heads) == len(factual) == len(other) and factual.startswith("factual") and other.startswith("other")


def test_words_are_data(tmp_path):
    text = "[bold]x[/bold] \x1b[31mred\x1b[0m {0} %s \u202eback"
    docs = [document(str(number), text) for number in range(30)]
    out = printed(compute(write(tmp_path, docs)), force_terminal=True, color_system=None)
    assert "bold]x[/bold" in out and "␛[31mred␛[0m" in out
    assert "\x1b" not in out and "\u202e" not in out


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0"), (99_999, "99,999"), (100_000, "100K"), (999_400, "999K"), (1_234_567, "1.23M")),
        *((12_345_678, "12.3M"), (3_000_000_000, "3.00B")),
    ],
)
def test_counts(number, text):
    assert tables._count(number) == text
