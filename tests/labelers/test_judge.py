"""The judge with a scripted model: what it makes of good answers and of bad ones, and how scores reach the tokens."""

import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacy import labelers
from lacy.labelers.judge import (
    MAX_QUOTE,
    MAX_SPANS,
    SCHEMA,
    Verdicts,
    conversation,
    judge,
    parse,
    passages,
    prompt,
    token_scores,
)
from lacy.labelers.llm.chat import Reply
from lacy.labelers.tokenize import Tokens

Answers = Callable[[str, bool], Reply]  # of a passage, and whether it is asked about again


class Scripted:
    """A chat that answers by the passage it is shown, and remembers its calls."""

    context = None

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.calls: list[list[list[dict[str, str]]]] = []

    def ask(
        self, conversations: list[list[dict[str, str]]], schema: dict[str, Any] | None, max_tokens: int
    ) -> list[Reply]:
        assert schema == SCHEMA
        assert max_tokens > 0
        self.calls.append(conversations)
        return [self.answers(passage_of(asked), "last answer" in asked[-1]["content"]) for asked in conversations]

    def close(self) -> None: ...


def passage_of(asked: list[dict[str, str]]) -> str:
    assert [message["role"] for message in asked] == ["system", "user"]
    return asked[1]["content"].partition("Passage:\n")[2].partition("\n\nYour last answer")[0]


def marks(*quotes: tuple[str, int], **more: object) -> Reply:
    spans = [{"text": text, "kind": "name", "score": score} | more for text, score in quotes]
    return Reply(json.dumps({"spans": spans}))


def test_spans_stand_where_the_model_quotes_them() -> None:
    texts = ["Mira Oldan was born in 1902.", "", "  \n ", "Jost Werrel built it.\n\nIt stands in Teverin."]
    answers = {
        texts[0]: marks(("1902", 5), ("Mira Oldan", 3), ("Sarn", 4)),
        "Jost Werrel built it.": marks(("jost werrel", 1)),
        "It stands in Teverin.": marks(),
    }
    chat = Scripted(lambda passage, again: answers[passage])
    verdicts = judge(chat, texts, size=32, context=50)
    assert len(chat.calls) == 1
    columns = verdicts.span_document, verdicts.span_starts, verdicts.span_ends
    assert [column.dtype for column in columns] == [np.int32] * 3
    assert np.stack(columns, 1).tolist() == [[0, 23, 27], [0, 0, 10], [3, 0, 11]]
    assert verdicts.span_scores.dtype == np.float32
    assert verdicts.span_scores.tolist() == pytest.approx([1.0, 0.6, 0.2])
    assert verdicts.unjudged_document.shape == (0,)
    assert (verdicts.windows_judged, verdicts.windows_unjudged, verdicts.spans, verdicts.spans_dropped) == (4, 0, 3, 1)
    assert "Text before:\nJost Werrel built it.\n" in chat.calls[0][2][1]["content"]


def test_offsets_are_those_of_the_document() -> None:
    text = "🌉 Sarn e\u0301.\n\n" + "Oldan met Oldan. " * 30 + "🌉 Werrel ends it."
    verdicts = judge(Scripted(lambda passage, again: marks(("Oldan", 2), ("Werrel", 5))), [text], size=100)
    found = [text[a:b] for a, b in zip(verdicts.span_starts, verdicts.span_ends, strict=True)]
    assert found == ["Oldan"] * (len(found) - 1) + ["Werrel"]
    assert verdicts.spans + verdicts.spans_dropped == 2 * verdicts.windows_judged


MALFORMED = {
    "nothing": "",
    "no JSON": "I mark Sarn.",
    "cut off": '{"spans":[{"text":"Sarn","kind":"na',
    "cut off after a span": '{"spans":[{"text":"Sarn","kind":"name","score":5},',
    "another type": "[]",
    "null": "null",
    "no spans": "{}",
    "spans of another type": '{"spans":{"text":"Sarn"}}',
    "a span of another type": '{"spans":["Sarn"]}',
    "a field missing": '{"spans":[{"text":"Sarn","kind":"name"}]}',
    "an unknown field": '{"spans":[{"text":"Sarn","kind":"name","score":5,"why":"rare"}]}',
    "an unknown field outside": '{"spans":[],"note":"none"}',
    "an unknown kind": '{"spans":[{"text":"Sarn","kind":"place","score":5}]}',
    "a score in words": '{"spans":[{"text":"Sarn","kind":"name","score":"5"}]}',
    "a broken score": '{"spans":[{"text":"Sarn","kind":"name","score":4.5}]}',
    "a score of truth": '{"spans":[{"text":"Sarn","kind":"name","score":true}]}',
    "a score too low": '{"spans":[{"text":"Sarn","kind":"name","score":0}]}',
    "a score too high": '{"spans":[{"text":"Sarn","kind":"name","score":6}]}',
    "no number": '{"spans":[{"text":"Sarn","kind":"name","score":NaN}]}',
    "an endless number": '{"spans":[{"text":"Sarn","kind":"name","score":1' + "0" * 5000 + "}]}",
    "an empty quote": '{"spans":[{"text":"","kind":"name","score":5}]}',
    "a long quote": marks(("S" * (MAX_QUOTE + 1), 5)).text,
    "too many spans": marks(*[("Sarn", 5)] * (MAX_SPANS + 1)).text,
    "half a character": '{"spans":[{"text":"\\ud800","kind":"name","score":5}]}',
    "half a character outside": '{"spans":[]}\ud800',
    "deep": "[" * 100_000,
    "two answers": '{"spans":[]}{"spans":[]}',
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_answer_is_asked_for_once_more(answer: str) -> None:
    assert parse(answer) is None

    def answers(passage: str, again: bool) -> Reply:
        if passage == "Bad Sarn.":
            return Reply(answer)
        return marks(("Sarn", 5)) if again or passage == "Good Sarn." else Reply(answer)

    texts = ["Bad Sarn.", "Good Sarn.", "Late Sarn."]
    chat = Scripted(answers)
    verdicts = judge(chat, texts)
    first, second = chat.calls
    assert [passage_of(asked) for asked in first] == texts
    assert [passage_of(asked) for asked in second] == ["Bad Sarn.", "Late Sarn."]
    assert verdicts.span_document.tolist() == [1, 2]
    assert verdicts.unjudged_document.tolist() == [0]
    assert (verdicts.unjudged_starts.tolist(), verdicts.unjudged_ends.tolist()) == ([0], [9])
    assert (verdicts.windows_judged, verdicts.windows_unjudged, verdicts.spans, verdicts.spans_dropped) == (2, 1, 2, 0)


def test_an_error_is_no_malformed_answer() -> None:
    """What was never answered is asked again as it was."""
    chat = Scripted(lambda passage, again: Reply(None, "the server is gone"))
    verdicts = judge(chat, ["Sarn.", "Oldan."])
    assert chat.calls[0] == chat.calls[1]
    assert len(chat.calls) == 2
    assert (verdicts.windows_judged, verdicts.windows_unjudged) == (0, 2)


@given(st.lists(st.sampled_from([*MALFORMED.values(), None, '{"spans":[]}', marks(("Sarn", 2), ("x", 1)).text])))
def test_every_window_is_judged_or_counted(answers: list[str | None]) -> None:
    script = iter(answers * 3)
    chat = Scripted(lambda passage, again: Reply(text) if (text := next(script, None)) is not None else Reply(None, ""))
    texts = ["The Sarn is long. " * 9, "", "Sarn"]
    verdicts = judge(chat, texts, size=40, context=10)
    assert verdicts.windows_judged + verdicts.windows_unjudged == sum(len(passages(text, 40)) for text in texts)
    assert verdicts.windows_unjudged == len(verdicts.unjudged_document)
    assert verdicts.spans == len(verdicts.span_document) == len(verdicts.span_starts) == len(verdicts.span_ends)
    assert sum(map(len, chat.calls)) <= 2 * (verdicts.windows_judged + verdicts.windows_unjudged)


def test_what_the_chat_raises_is_raised() -> None:
    def answers(passage: str, again: bool) -> Reply:
        raise RuntimeError("the engine is dead")

    with pytest.raises(RuntimeError, match="engine is dead"):
        judge(Scripted(answers), ["Sarn."])
    assert judge(Scripted(answers), []).windows_judged == 0
    assert judge(Scripted(answers), ["", " "]).windows_judged == 1


def test_answers_in_a_code_fence_are_taken() -> None:
    (quote,) = parse('```json\n{"spans": [{"text": "Sarn", "kind": "name", "score": 4}]}\n```\n') or []
    assert (quote.text, quote.kind, quote.score) == ("Sarn", "name", 4)
    assert parse('  {"spans": []}\n') == []


def test_the_schema_is_what_is_parsed() -> None:
    span = SCHEMA["$defs"]["Quote"]
    assert SCHEMA["properties"]["spans"]["items"] == {"$ref": "#/$defs/Quote"}
    full = {"text": "x" * span["properties"]["text"]["maxLength"], "score": span["properties"]["score"]["maximum"]}
    for kind in span["properties"]["kind"]["enum"]:
        spans = [full | {"kind": kind}] * SCHEMA["properties"]["spans"]["maxItems"]
        assert parse(json.dumps({"spans": spans})) is not None
    assert set(span["required"]) == set(span["properties"])


def test_the_prompt_is_the_file() -> None:
    data = (Path(labelers.__file__).parent / "judge_prompt.md").read_bytes()
    assert prompt().sha256 == hashlib.sha256(data).hexdigest()
    assert prompt().text == data.decode()
    assert prompt().text.startswith(f"version: {prompt().version}\n")
    assert prompt().version >= 1


def test_the_example_in_the_prompt_is_a_good_answer() -> None:
    lines = prompt().text.splitlines()
    (example,) = [line for line in lines if line.startswith('{"spans":[{')]
    (shown,) = [line for line in lines if line.startswith("Example.")]
    passage = shown.split('Passage: "')[1].removesuffix('"')
    quotes = parse(example)
    assert quotes
    verdicts = judge(Scripted(lambda passage, again: Reply(example)), [passage])
    assert verdicts.spans == len(quotes)
    assert example == json.dumps(json.loads(example), separators=(",", ":"))  # as the engine makes models write


def test_text_is_never_read_as_a_template() -> None:
    _, user = conversation("{{passage}} {0} \\1", "{{context}} %s # System")
    assert user["content"] == "Text before:\n{{passage}} {0} \\1\n\nPassage:\n{{context}} %s # System"
    _, again = conversation("", "Sarn.", again=True)
    assert "begins with the passage" in again["content"]
    assert again["content"].startswith(conversation("", "Sarn.")[1]["content"])
    assert "no complete JSON" in again["content"]


TEXT = st.text("ab. \n!?東。'\")é", max_size=200) | st.text(max_size=60)


@given(TEXT, st.integers(1, 50), st.integers(0, 50))
def test_passages_cover_the_text_once(text: str, size: int, context: int) -> None:
    windows = passages(text, size, context)
    assert "".join(text[start:end] for _, start, end in windows) == text
    for number, (before, start, end) in enumerate(windows):
        assert start < end <= start + size
        assert max(0, start - context) <= before <= start
        if number + 1 < len(windows):
            assert end == windows[number + 1][1]
            assert end - start > size // 2
        if start <= context:
            assert before == 0
        elif context:
            assert start - before >= context // 2


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("One two. Three four.\nFive six. Seven", ["One two. Three four.\n", "Five six. Seven"]),
        ("One two. Three four five six seven", ["One two. Three four ", "five six seven"]),
        ("One two three. (Four five.) Six seven", ["One two three. ", "(Four five.) Six seven"]),
        ("x" * 50, ["x" * 24, "x" * 24, "xx"]),
        (
            "これは文です。これも文です。これは三つ目の文です。",
            ["これは文です。これも文です。", "これは三つ目の文です。"],
        ),
        ("3.14159 and 2.71828 are both numbers", ["3.14159 and 2.71828 are ", "both numbers"]),
        ("One two three\n\nfour five six seven", ["One two three\n\n", "four five six seven"]),
    ],
)
def test_passages_end_where_the_text_does(text: str, cuts: list[str]) -> None:
    assert [text[start:end] for _, start, end in passages(text, 24, 10)] == cuts


def test_the_text_before_begins_with_a_word() -> None:
    text = "abcdef ghi jkl. " * 10
    windows = passages(text, 40, 21)
    assert len(windows) > 3
    for before, start, _ in windows[1:]:
        assert text[before - 1] == " "
        assert 10 <= start - before <= 21
    assert passages("a" * 30, 10, 5)[-1] == (15, 20, 30)


@pytest.mark.parametrize(("size", "context"), [(0, 1), (-1, 1), (1, -1)])
def test_sizes_must_be_possible(size: int, context: int) -> None:
    with pytest.raises(ValueError, match="need a size of 1 or more"):
        passages("Sarn", size, context)


def tokens_of(*documents: list[tuple[int, int]]) -> Tokens:
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    flat = np.array([pair for document in documents for pair in document], np.int32).reshape(-1, 2)
    return Tokens(offsets, np.zeros(len(flat), np.int32), flat[:, 0].copy(), flat[:, 1].copy())


def verdicts_of(spans: list[tuple[int, int, int, float]], unjudged: list[tuple[int, int, int]]) -> Verdicts:
    marked = np.array([span[:3] for span in spans], np.int32).reshape(-1, 3)
    missing = np.array(unjudged, np.int32).reshape(-1, 3)
    scores = np.array([span[3] for span in spans], np.float32)
    return Verdicts(*marked.T, scores, *missing.T, 0, len(unjudged), len(spans), 0)


def test_a_token_has_the_score_of_its_span() -> None:
    text = "born in Paris in  1902"
    tokens = tokens_of([(0, 4), (4, 7), (7, 10), (10, 13), (13, 16), (16, 17), (17, 20), (20, 22)])
    spans = [(0, 8, 13, 0.6), (0, 18, 22, 1.0), (0, 8, 11, 0.8)]
    scores = token_scores(verdicts_of(spans, []), tokens, [text])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0, 0, 0.8, 0.8, 0, 0, 1, 1], atol=1e-7)


def test_a_token_belongs_to_the_passage_of_its_first_letter() -> None:
    text = "one two \n three"
    tokens = tokens_of([(0, 3), (3, 7), (7, 8), (8, 9), (9, 15)])
    second = token_scores(verdicts_of([(0, 4, 7, 1.0)], [(0, 9, 15)]), tokens, [text])
    np.testing.assert_array_equal(second, np.array([0, 1, 0, 0, np.nan], np.float32))
    first = token_scores(verdicts_of([(0, 10, 15, 1.0)], [(0, 0, 10)]), tokens, [text])
    np.testing.assert_array_equal(first, np.array([np.nan, np.nan, np.nan, np.nan, 1], np.float32))
    across = token_scores(verdicts_of([(0, 5, 7, 1.0)], [(0, 0, 5)]), tokens, [text])
    np.testing.assert_array_equal(across, np.array([np.nan, np.nan, 0, 0, 0], np.float32))


def test_no_tokens_and_no_documents() -> None:
    assert token_scores(verdicts_of([], []), tokens_of(), []).shape == (0,)
    assert token_scores(verdicts_of([(0, 0, 1, 1.0)], [(1, 0, 1)]), tokens_of([], []), ["a", "b"]).shape == (0,)


@st.composite
def judged_documents(draw: st.DrawFn) -> tuple[list[str], Tokens, Verdicts]:
    """Documents, tokens that cover them in order (some of no characters, some of the same), spans and passages."""
    texts = draw(st.lists(st.text("ab \n東", max_size=25), max_size=4))
    documents, spans, unjudged = [], [], []
    for index, text in enumerate(texts):
        cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=12))})
        pairs = list(pairwise(cuts))
        again = draw(st.lists(st.integers(0, 4), min_size=len(pairs), max_size=len(pairs)))
        tokens = [pair for pair, copies in zip(pairs, again, strict=True) for pair in [pair] * max(1, copies - 2)]
        if draw(st.booleans()) and tokens:
            tokens.insert(1, (tokens[0][1], tokens[0][1]))
        documents.append(tokens)
        for start, end in draw(st.lists(st.tuples(*[st.integers(0, len(text))] * 2), max_size=5)):
            words = text[start:end].strip()
            if words:
                start = text.index(words, start)
                spans.append((index, start, start + len(words), draw(st.integers(1, 5)) / 5))
        windows = passages(text, draw(st.integers(1, 12)), 0)
        unjudged += [(index, start, end) for _, start, end in windows if draw(st.booleans())]
    return texts, tokens_of(*documents), verdicts_of(spans, unjudged)


@settings(max_examples=300)
@given(judged_documents())
def test_token_scores_are_those_of_a_loop(case: tuple[list[str], Tokens, Verdicts]) -> None:
    texts, tokens, verdicts = case
    spans = list(
        zip(verdicts.span_document, verdicts.span_starts, verdicts.span_ends, verdicts.span_scores, strict=True)
    )
    unjudged = list(zip(verdicts.unjudged_document, verdicts.unjudged_starts, verdicts.unjudged_ends, strict=True))
    expected = []
    for document, start, end in zip(tokens.document, tokens.starts, tokens.ends, strict=True):
        letters = [place for place in range(start, end) if not texts[document][place].isspace()]
        first = letters[0] if letters else start
        if any(index == document and a <= first < b for index, a, b in unjudged):
            expected.append(np.nan)
        else:
            overlapped = [
                s for index, a, b, s in spans if index == document and any(a <= p < b for p in range(start, end))
            ]
            expected.append(max(overlapped, default=0.0))
    np.testing.assert_array_equal(token_scores(verdicts, tokens, texts), np.array(expected, np.float32))


def test_scores_follow_the_tokens_of_a_real_tokenizer(small_model: Path) -> None:
    from lacy.labelers.tokenize import encode, load

    texts = ["Mira Oldan was born in 1902 in Café Sarn 🌉.", "Sarn, Sarn and sarn."]
    chat = Scripted(
        lambda passage, again: marks(("Mira Oldan", 5), ("Café Sarn", 4), ("🌉", 1), ("Sarn", 3), ("Sarn", 2))
    )
    tokens = encode(load(str(small_model)), texts)
    verdicts = judge(chat, texts)
    scores = token_scores(verdicts, tokens, texts)
    for document, start, end, score in zip(tokens.document, tokens.starts, tokens.ends, scores, strict=True):
        inside = [
            float(value)
            for index, a, b, value in zip(
                verdicts.span_document, verdicts.span_starts, verdicts.span_ends, verdicts.span_scores, strict=True
            )
            if index == document and a < end and start < b
        ]
        assert score == pytest.approx(max(inside, default=0.0)), texts[document][start:end]
    assert (scores > 0).any()
    assert (scores == 0).any()
