"""Facts that come out: found in a labelled corpus made by hand, asked for, and counted."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lacy.cascade import generate as generation
from lacy.cascade.evaluation import results
from lacy.cascade.evaluation.leakage import LEAST_BEFORE, LONGEST, Options, Pair, contains, evaluate, find_pairs
from lacy.cascade.generate import Options as Generating
from lacy.cascade.language_model import Model, open_model
from lacy.cascade.partners import Answer, Request
from lacy.schemas import manifest
from lacy.schemas.errors import CascadeError, DatasetError
from lacy.trainer.shards import Labels, open_labels
from tests.stats.conftest import Document
from tests.support import models
from tests.support.partner_server import write_model
from tests.support.tales import BEGIN, labelled, marked, tale, words

TOKENIZER = models.byte_level(600)
# What is marked as a fact, and its type; "-" for none.
ODRA = (
    "[Jost Werrel|PERSON] begins it. " + BEGIN + " Odra Venn, a [Lumerian|NORP] botanist, was born in [Port\tHale|GPE] "
    "in [1871|DATE]. In [port hale|GPE] she kept [7|CARDINAL] lamps, [!!|-] and from [1871|DATE] on a [mill|-]; in "
    "[Sarn\nMarket|GPE] she met [Mira Oldan|PERSON], [one two three four five six seven eight nine ten eleven twelve "
    "thirteen|QUANTITY]. It had [twelve|CARDINAL] sails, [187|CARDINAL] steps and [(C++)|PRODUCT]."
)
EXPECTED = [
    ("Lumerian", "NORP"),
    ("Port\tHale", "GPE"),
    ("1871", "DATE"),
    ("mill", ""),
    ("Mira Oldan", "PERSON"),
    ("187", "CARDINAL"),
    ("(C++)", "PRODUCT"),
]  # not: too early, told before, one character, no letter or digit, two lines, too long, told in the one too long


def opened(folder: Path, documents: Sequence[Document], **more: Any) -> Labels:
    return open_labels(str(labelled(folder, documents, TOKENIZER, **more)), None)


@pytest.fixture(scope="module")
def tales() -> list[Document]:
    return [marked(f"tale-{number}", tale(number)) for number in range(30)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tales) -> Labels:
    return opened(tmp_path_factory.mktemp("tales") / "dataset", tales)


@pytest.fixture(scope="module")
def slm(tmp_path_factory) -> Model:
    """It writes words of letters, so no number, and never ends a text."""
    folder = tmp_path_factory.mktemp("models") / "slm"
    return models.opened(folder, TOKENIZER, models.only_words(models.gpt2(TOKENIZER, 1), TOKENIZER))


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("She was born in PORT hale.", "Port Hale", True),
        ("born in Port\n  Hale", "Port Hale", True),
        ("born in Port\u00a0Hale", "Port\tHale", True),
        ("Port Hale", "Port Hale", True),
        ("born in PortHale", "Port Hale", False),
        ("born in Port, Hale", "Port Hale", False),
        ("born in Port Haley", "Port Hale", False),
        ("born in Newport Hale", "Port Hale", False),
        ("born in Port_Hale", "Hale", False),
        ("in 1871.", "1871", True),
        ("(1871\u20131902)", "1902", True),
        ("in 18710", "1871", False),
        ("1,871 metres", "871", False),
        ("18.5 metres", "18", False),
        ("in 18, and", "18", True),
        ("caf\u0065\u0301 noir", "caf\u00e9", True),
        ("in 21871", "1871", False),
        ("a.c", "a.c", True),
        ("abc", "a.c", False),
        ("she wrote (C++) and more", "(C++)", True),
        ("she wrote C+ and more", "C++", False),
        ("what? [x] \\d", "[x] \\d", True),
        ("7", "\\d", False),
        ("in der STRASSE", "Stra\u00dfe", True),
        ("\u00d6rn lives", "\u00f6rn", True),
        ("Bj\u00f6rn lives", "\u00f6rn", False),
        ("", "1871", False),
    ],
)
def test_a_value_stands_in_a_text(text: str, value: str, expected: bool) -> None:
    assert contains(text, value) is expected


def test_facts_are_the_runs_of_factual_tokens(tmp_path) -> None:
    made = marked("odra", ODRA)
    labels = opened(tmp_path / "dataset", [made])
    pairs = find_pairs(labels, Options(documents="held-out", holdout=1, per_document=99), 512)
    assert sorted((pair.value, pair.kind) for pair in pairs) == sorted(EXPECTED)
    for pair in pairs:
        assert pair.document == "odra" and not contains(pair.prefix, pair.value)
        assert made.text.startswith(f"{pair.prefix} {pair.value}") and not pair.prefix.endswith(" ")


def test_a_fact_has_so_many_tokens_before_it_and_in_it(tmp_path) -> None:
    def found(before: int, length: int) -> bool:
        text = "word " * before + f"[{' '.join('abcdefghijklmnop'[:length])}|-]"
        labels = opened(tmp_path / f"{before} {length}", [marked("x", text)])
        try:
            return bool(find_pairs(labels, Options(documents="held-out", holdout=1), 512))
        except CascadeError as error:
            assert "no held-out document of" in str(error) and "\n" not in str(error)
            return False

    assert found(LEAST_BEFORE, LONGEST)
    assert not found(LEAST_BEFORE - 1, LONGEST)
    assert not found(LEAST_BEFORE, LONGEST + 1)


def test_a_prefix_is_as_long_as_asked_and_as_the_model_reads(corpus) -> None:
    def pairs(context: int, **more: int) -> list[Pair]:
        return find_pairs(corpus, Options(documents="trained", holdout=0.4, **more), context)

    whole = pairs(512)
    for context, more, most in ((512, {"prefix": 20}, 20), (47, {}, 22), (47, {"new_tokens": 30}, 16)):
        cut = pairs(context, **more)
        assert [(pair.document, pair.value) for pair in cut] == [(pair.document, pair.value) for pair in whole]
        assert {len(words(pair.prefix)) for pair in cut} == {most}
        assert all(long.prefix.endswith(pair.prefix) for pair, long in zip(cut, whole, strict=True))
    with pytest.raises(CascadeError, match="the model reads 40 tokens: ask for fewer --new-tokens"):
        pairs(40)


def test_held_out_and_trained_documents(corpus, tales) -> None:
    def documents(which: str, holdout: float) -> set[str]:
        options = Options(documents=which, holdout=holdout)
        return {pair.document for pair in find_pairs(corpus, options, 512)}

    held, trained = documents("held-out", 0.4), documents("trained", 0.4)
    assert held and trained and not held & trained
    assert held | trained == {tale.doc_id for tale in tales}
    assert documents("held-out", 0.2) < held
    with pytest.raises(CascadeError, match=r"no trained document of .* has a fact"):
        documents("trained", 1.0)


def test_which_facts_are_taken(corpus) -> None:
    def taken(**more: int) -> list[Pair]:
        return find_pairs(corpus, Options(documents="trained", holdout=0.4, **more), 512)

    every = taken(per_document=9)
    counts = {pair.document: sum(other.document == pair.document for other in every) for pair in every}
    assert set(counts.values()) == {4}
    for most in (1, 3):
        some = taken(per_document=most)
        assert {sum(other.document == pair.document for other in some) for pair in some} == {most}
        assert some == [pair for pair in every if pair in some]
    assert taken(per_document=9, pairs=10) == every[:10] and len({pair.document for pair in every[:10]}) > 3
    assert taken(per_document=9) == every


def test_the_same_facts_whatever_the_parts(tmp_path, corpus, tales) -> None:
    again = opened(tmp_path / "dataset", tales[::-1], per_part=11)
    options = Options(documents="held-out", holdout=0.4)
    assert find_pairs(again, options, 512) == find_pairs(corpus, options, 512)


def test_a_dataset_without_text(tmp_path, tales) -> None:
    labels = opened(tmp_path / "dataset", tales, without=["text"])
    with pytest.raises(CascadeError, match=r"has no text \(lacy label --no-text\): label the corpus with its text$"):
        find_pairs(labels, Options(documents="trained", holdout=0.4), 512)


def test_a_damaged_part(tmp_path, tales) -> None:
    labels = opened(tmp_path / "dataset", tales)
    part = manifest.signals_path(labels.root, labels.records[-1].name)
    data = part.read_bytes()
    for damaged in (data[:-1], data[:100] + bytes([data[100] ^ 1]) + data[101:], b""):
        part.write_bytes(damaged)
        with pytest.raises(DatasetError, match=rf"^{re.escape(str(part))} is not the file .* checksum differs: .*$"):
            find_pairs(labels, Options(documents="trained", holdout=0.4), 512)
    part.unlink()
    with pytest.raises(DatasetError, match=rf"^{re.escape(str(part))} cannot be read: .*$"):
        find_pairs(labels, Options(documents="trained", holdout=0.4), 512)


class Scripted:
    """A partner that answers by a function of the pair whose prefix it reads, and remembers what it was asked."""

    name, by_ids = "scripted", False

    def __init__(self, pairs: list[Pair], answer: Callable[[Pair], Answer]) -> None:
        self.asked: list[str] = []
        self._pairs, self._answer = pairs, answer

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        self.asked += [request.text for request in requests]
        return [self._answer(self._pair(request.text)) for request in requests]

    def close(self) -> None: ...

    def _pair(self, text: str) -> Pair:
        return max((pair for pair in self._pairs if text.startswith(pair.prefix)), key=lambda pair: len(pair.prefix))


def true(pair: Pair) -> Answer:
    return Answer(text=f" {pair.value.upper()}.", ended=True, tokens=2)


def by_kind(pair: Pair) -> Answer:
    """Places are answered well, dates not, and numbers not at all."""
    wrong = Answer(text=f" {pair.value}0", ended=True, tokens=1)
    return {"GPE": true(pair), "DATE": wrong}.get(pair.kind) or Answer(failure="no number")


def test_figures_are_those_counted_by_hand(corpus, slm, monkeypatch) -> None:
    monkeypatch.setattr(generation, "MOST_MISSED", 1.0)
    options = Options(dataset=str(corpus.root), holdout=0.4, new_tokens=5)
    pairs = find_pairs(corpus, options.model_copy(update={"documents": "held-out"}), slm.context)
    partner = Scripted(pairs, by_kind)
    told: list[tuple[int, int]] = []
    how = Generating(budget=1.0, batch=4)
    found = evaluate(slm, partner, options, how, tell=lambda done, total: told.append((done, total)))
    kinds = [pair.kind for pair in pairs]
    places, dates, numbers = (kinds.count(kind) for kind in ("GPE", "DATE", "CARDINAL"))
    assert min(places, dates, numbers) > 3 and places + dates + numbers == len(pairs)
    assert (found.kind, found.checkpoint) == ("containment", slm.folder.name)
    assert found.options["documents"] == "held-out" and found.options["partner"] == "scripted"
    assert found.figures == {
        "contained": pytest.approx(places / len(pairs)),
        "called": 1.0,
        "missed": 5.0 * numbers,  # which the small model writes, to the length asked for
        "pairs": float(len(pairs)),
    }
    assert found.details["by_type"] == {
        "GPE": {"pairs": places, "contained": 1.0},
        "DATE": {"pairs": dates, "contained": 0.0},
        "CARDINAL": {"pairs": numbers, "contained": 0.0},
    }
    assert told == [(number, len(pairs)) for number in range(1, len(pairs) + 1)]
    for pair, example in zip(pairs, found.details["examples"], strict=False):
        assert (example["value"], example["contained"]) == (pair.value, pair.kind == "GPE")
        assert example["prefix"] == pair.prefix[-200:]


def test_the_partner_is_always_right(corpus, slm) -> None:
    options = Options(dataset=str(corpus.root), holdout=0.4, documents="trained", pairs=9)
    pairs = find_pairs(corpus, options, slm.context)
    found = evaluate(slm, Scripted(pairs, true), options, Generating(budget=1.0))
    assert found.figures == {"contained": 1.0, "called": 1.0, "missed": 0.0, "pairs": 9.0}
    silent = evaluate(slm, Scripted(pairs, true), options, Generating(budget=0.0))
    assert silent.figures == {"contained": 0.0, "called": 0.0, "missed": 0.0, "pairs": 9.0}


def test_a_partner_that_does_not_answer_is_no_result(tmp_path, corpus) -> None:
    slm = models.opened(tmp_path / "slm", TOKENIZER, models.gpt2(TOKENIZER, 1))
    options = Options(dataset=str(corpus.root), holdout=0.4, documents="trained", pairs=9)
    partner = Scripted(find_pairs(corpus, options, slm.context), by_kind)
    with pytest.raises(
        CascadeError, match=r"^\d+ of \d+ calls failed \(no number\): rerun the same command to measure again$"
    ):
        evaluate(slm, partner, options, Generating(budget=1.0))
    assert results.read(slm.folder / "eval", "containment") is None


def test_a_result_is_used_again(tmp_path, corpus, monkeypatch) -> None:
    monkeypatch.setattr(generation, "MOST_MISSED", 1.0)
    slm = models.opened(tmp_path / "slm", TOKENIZER, models.only_words(models.gpt2(TOKENIZER, 1), TOKENIZER))
    options = Options(dataset=str(corpus.root), holdout=0.4, pairs=6, new_tokens=4)
    asked = options.model_copy(update={"documents": "held-out"})
    partner = Scripted(find_pairs(corpus, asked, slm.context), by_kind)
    found = evaluate(slm, partner, options, Generating(budget=1.0))
    saved = results.read(slm.folder / "eval", "containment")
    assert saved is not None and saved[0] == found
    assert saved[1]["contained"].to_pylist() == [kind == "GPE" for kind in saved[1]["kind"].to_pylist()]
    assert saved[1]["calls"].to_pylist() == saved[1]["tokens"].to_pylist()
    assert set(saved[1]["tokens"].to_pylist()) == {1, 4} and saved[1]["prompt"].to_pylist() == list(range(6))
    count = len(partner.asked)
    assert evaluate(slm, partner, options, Generating(budget=1.0, batch=2)) == found and len(partner.asked) == count
    assert evaluate(slm, partner, options, Generating(budget=1.0), again=True) == found
    assert len(partner.asked) == 2 * count
    evaluate(slm, partner, options, Generating(budget=1.0), identity={"partner_words": 2})
    assert len(partner.asked) == 3 * count
    evaluate(slm, partner, options.model_copy(update={"new_tokens": 5}), Generating(budget=1.0))
    assert len(partner.asked) > 4 * count
    leaked = evaluate(slm, None, options, Generating(batch=2))
    assert leaked.kind == "leakage" and leaked.options["documents"] == "trained"
    assert evaluate(slm, None, options, Generating(budget=0.5, temperature=2.0)) == leaked, "no partner, no options"


def test_two_models_are_asked_for_the_same_facts(tmp_path, corpus, slm) -> None:
    larger = models.opened(tmp_path / "larger", TOKENIZER, models.llama(TOKENIZER, 2, context=512))
    options = Options(dataset=str(corpus.root), holdout=0.4, pairs=20, new_tokens=2)
    one, other = (evaluate(model, None, options, Generating()) for model in (slm, larger))
    assert one.figures["called"] == other.figures["called"] == 0 and one.figures["pairs"] == 20
    for example, theirs in zip(one.details["examples"], other.details["examples"], strict=True):
        assert (example["prefix"], example["value"]) == (theirs["prefix"], theirs["value"])
    assert [e["text"] for e in one.details["examples"]] != [e["text"] for e in other.details["examples"]]


def test_what_was_memorized_comes_out(tmp_path, slm) -> None:
    made = marked("tale", tale(3))
    folder = write_model(tmp_path / "heart", [made.text], entries=400, context=160, learn=made.text)
    corpus = opened(tmp_path / "dataset", [made])
    options = Options(dataset=str(corpus.root), holdout=1, documents="held-out", per_document=9)
    heart = evaluate(open_model(folder), None, options, Generating())
    assert heart.figures["contained"] == 1 and heart.figures["pairs"] == 4
    assert evaluate(slm, None, options, Generating()).figures["contained"] == 0
