"""The LLM judge: a model reads documents and marks the spans that a small model could not infer.

A document is read in passages, each with the text before it. The model answers in JSON and quotes what it marks; the
quotes are then located in the passage (`lacy.labelers.quotes`). A malformed answer is asked for once more. A passage
without a verdict after that is unjudged, which is different from unmarked: its tokens have no score.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from lacy.labelers.align import token_words
from lacy.labelers.llm.chat import Chat, Conversation
from lacy.labelers.llm.prompts import Prompt, ask_json, parse_answer, read_prompt
from lacy.labelers.quotes import locate
from lacy.labelers.tokenize import Tokens

# Four characters of English are about a token, so the prompt (400 tokens), a passage with as much text before it and
# the answer fit into a context of 2048 tokens. Longer passages cost less, but small models get lost in them.
PASSAGE = 1200  # characters
CONTEXT = 1200  # characters of text before a passage
MAX_ANSWER = 640  # tokens: MAX_SPANS of the usual length

MAX_SPANS = 24  # of a passage
MAX_QUOTE = 120  # characters
MAX_SCORE = 5

Kind = Literal["name", "date", "number", "attribute"]


class Quote(BaseModel):
    """A span as the model quotes it. Scores range from 1, easy to infer, to 5, impossible to infer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: Annotated[str, Field(min_length=1, max_length=MAX_QUOTE)]
    kind: Kind
    score: Annotated[int, Field(ge=1, le=MAX_SCORE)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    spans: Annotated[list[Quote], Field(max_length=MAX_SPANS)]


SCHEMA: dict[str, Any] = _Answer.model_json_schema()


@dataclass(frozen=True)
class Verdicts:
    """The judge's verdicts on D documents: S spans and U passages without a verdict, each in order of document.

    span_document       (S,) int32: the document of each span
    span_starts         (S,) int32, `span_ends` (S,) int32: half-open character offsets; the spans of a passage are in
                        the order in which the model named them, and may overlap
    span_scores         (S,) float32 in (0, 1]: how hard to infer, 1 for impossible
    unjudged_document   (U,) int32, `unjudged_starts`, `unjudged_ends` (U,) int32: the passages without a verdict, in
                        order of offset within a document
    windows_judged      passages with a verdict, including empty ones
    windows_unjudged    U
    spans               S
    spans_dropped       quotes that are not in their passage, or more often quoted than they occur
    """

    span_document: np.ndarray
    span_starts: np.ndarray
    span_ends: np.ndarray
    span_scores: np.ndarray
    unjudged_document: np.ndarray
    unjudged_starts: np.ndarray
    unjudged_ends: np.ndarray
    windows_judged: int
    windows_unjudged: int
    spans: int
    spans_dropped: int

    def counts(self) -> dict[str, int]:
        """The counts that are summed over the parts of a dataset."""
        names = ("windows_judged", "windows_unjudged", "spans", "spans_dropped")
        return {name: getattr(self, name) for name in names}


def prompt() -> Prompt:
    """The judge's prompt, as shipped."""
    return read_prompt("lacy.labelers", "judge_prompt.md")


def judge(
    chat: Chat, texts: list[str], *, size: int = PASSAGE, context: int = CONTEXT, max_tokens: int = MAX_ANSWER
) -> Verdicts:
    """Have a model read documents and mark their spans.

    size, context  characters of a passage, and of the text before it that the model reads too (`passages`)
    max_tokens     of an answer, at most

    All passages go to the chat in one call, and those without a usable answer in a second. Raises what `chat` raises;
    a passage that cannot be judged raises nothing. A passage of white space counts as judged and is not asked about.
    """
    windows = [(index, *window) for index, text in enumerate(texts) for window in passages(text, size, context)]
    asked = [number for number, (index, _, start, end) in enumerate(windows) if not texts[index][start:end].isspace()]

    def question(number: int, again: bool) -> Conversation:
        index, before, start, end = windows[asked[number]]
        return conversation(texts[index][before:start], texts[index][start:end], again=again)

    replies = ask_json(chat, question, len(asked), SCHEMA, parse, max_tokens=max_tokens)
    answers: list[list[Quote] | None] = [[] for _ in windows]
    for number, (quotes, _) in zip(asked, replies, strict=True):
        answers[number] = quotes

    spans: list[tuple[int, int, int]] = []
    scores: list[float] = []
    unjudged: list[tuple[int, int, int]] = []
    dropped = 0
    for (index, _, start, end), quotes in zip(windows, answers, strict=True):
        if quotes is None:
            unjudged.append((index, start, end))
            continue
        located = locate(texts[index][start:end], [quote.text for quote in quotes])
        for quote, span in zip(quotes, located, strict=True):
            if span is None:
                dropped += 1
            else:
                spans.append((index, start + span[0], start + span[1]))
                scores.append(quote.score / MAX_SCORE)
    marked, missing = _offsets(spans), _offsets(unjudged)
    return Verdicts(
        span_document=marked[0],
        span_starts=marked[1],
        span_ends=marked[2],
        span_scores=np.array(scores, np.float32),
        unjudged_document=missing[0],
        unjudged_starts=missing[1],
        unjudged_ends=missing[2],
        windows_judged=len(windows) - len(unjudged),
        windows_unjudged=len(unjudged),
        spans=len(spans),
        spans_dropped=dropped,
    )


def conversation(before: str, passage: str, *, again: bool = False) -> Conversation:
    """The messages that ask about a passage, with the text before it.

    again  after a malformed answer: the same with a reminder, as greedy decoding would repeat the answer
    """
    fields = {"context": before.strip() or "(The text begins with the passage.)", "passage": passage.strip()}
    return prompt().conversation(fields, again=again)


def passages(text: str, size: int = PASSAGE, context: int = CONTEXT) -> list[tuple[int, int, int]]:
    """Cut a text into windows: (start of the context, start, end), in characters, half open.

    The passages `[start, end)` cover each character of the text once, and have at most `size` characters. All but the
    last have more than half of that, and end with the last paragraph, else sentence, else word that ends in their
    second half; without any, a passage is cut at `size`. The context before a passage has at most `context` characters,
    and begins with a word if one begins in its first half. Raises ValueError for a size below 1 or a context below 0.
    """
    if size < 1 or context < 0:
        raise ValueError(f"passages need a size of 1 or more and a context of 0 or more, not {size} and {context}")
    windows = []
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = _last_border(text, start, start + size // 2 + 1, end)
        end = min(end, len(text))
        before = max(0, start - context)
        if before and (word := _WHITE_SPACE.search(text, before - 1, start - context // 2)):
            before = word.end()
        windows.append((before, start, end))
        start = end
    return windows


def parse(answer: str) -> list[Quote] | None:
    """The quotes of an answer that follows `SCHEMA`, with or without a code fence around it; else None."""
    parsed = parse_answer(answer, _Answer)
    return None if parsed is None else parsed.spans


def token_scores(verdicts: Verdicts, tokens: Tokens, texts: list[str]) -> np.ndarray:
    """The judge's score of each token of the documents that were judged: (T,) float32.

    A token has the highest score of the spans that share a character with it; 0 outside of spans in a judged passage;
    NaN in an unjudged one. A token belongs to the passage with its first non-whitespace character, or, if it has none,
    with its first character.
    """
    lengths = np.array([len(text) for text in texts], np.int64)
    base = np.concatenate([[0], np.cumsum(lengths + 1)])[:-1]  # one character between documents keeps them apart
    starts, ends = tokens.starts + base[tokens.document], tokens.ends + base[tokens.document]
    scores = np.zeros(len(starts), np.float32)

    span_starts = verdicts.span_starts + base[verdicts.span_document]
    span_ends = verdicts.span_ends + base[verdicts.span_document]
    low = np.searchsorted(np.maximum.accumulate(ends), span_starts, side="right")
    high = np.searchsorted(np.minimum.accumulate(starts[::-1])[::-1], span_ends, side="left")
    count = np.maximum(high - low, 0)
    span = np.repeat(np.arange(len(count)), count)
    token = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
    shared = np.minimum(ends[token], span_ends[span]) > np.maximum(starts[token], span_starts[span])
    np.maximum.at(scores, token[shared], verdicts.span_scores[span[shared]])

    if verdicts.windows_unjudged:
        document = np.arange(len(texts))
        blank = token_words(tokens, texts, document, np.zeros(len(texts), np.int64), lengths) < 0
        unjudged = verdicts.unjudged_document, verdicts.unjudged_starts, verdicts.unjudged_ends
        begins = unjudged[1] + base[unjudged[0]]
        index = np.searchsorted(begins, starts, side="right") - 1
        starts_there = (index >= 0) & (starts < (unjudged[2] + base[unjudged[0]])[index])
        scores[np.where(blank, starts_there, token_words(tokens, texts, *unjudged) >= 0)] = np.nan
    return scores


_WHITE_SPACE = re.compile(r"\s+")
_BORDERS = (
    re.compile(r"\n\s*"),
    re.compile(r"[.!?][\"')\]\u2019\u201d\u00bb]*\s+|[。！？][」』）]*\s*"),  # noqa: RUF001
    _WHITE_SPACE,
)


def _last_border(text: str, start: int, first: int, last: int) -> int:
    """The end of the last paragraph, else sentence, else word from `start` on within [first, last]; else `last`."""
    for border in _BORDERS:
        ends = [match.end() for match in border.finditer(text, start, last)]
        if ends and ends[-1] >= first:
            return ends[-1]
    return last


def _offsets(ranges: list[tuple[int, int, int]]) -> np.ndarray:
    """(3, N) int32: document, start and end of each range."""
    return np.array(ranges, np.int32).reshape(-1, 3).T.copy()
