"""The LLM judge: a model reads documents and marks the spans that a small model could not infer.

A document is read in passages, each with the text before it, and the model answers in JSON with quotes of what it
marks, which are then found in the passage (`labelers.quotes`). An answer that is no such JSON is asked for once more; a
passage that has no verdict after that is unjudged, which is not the same as unmarked: its tokens have no score.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib import resources
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lacy.labelers.align import token_words
from lacy.labelers.llm.chat import Chat
from lacy.labelers.quotes import locate
from lacy.labelers.tokenize import Tokens

# Four characters of English are about a token, so the prompt (400 tokens), a passage with as much text before it and
# the answer fit into a context of 2048 tokens. Longer passages cost less, but small models lose their place in them.
PASSAGE = 1200  # characters
CONTEXT = 1200  # characters of text before a passage
MAX_ANSWER = 640  # tokens: MAX_SPANS of the usual length

MAX_SPANS = 24  # of a passage
MAX_QUOTE = 120  # characters
MAX_SCORE = 5

Kind = Literal["name", "date", "number", "attribute"]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "spans": {
            "type": "array",
            "maxItems": MAX_SPANS,
            "items": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "minLength": 1, "maxLength": MAX_QUOTE},
                    "kind": {"type": "string", "enum": list(get_args(Kind))},
                    "score": {"type": "integer", "minimum": 1, "maximum": MAX_SCORE},
                },
                "required": ["text", "kind", "score"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["spans"],
    "additionalProperties": False,
}


class Quote(BaseModel):
    """A span as the model quotes it; a score of 1 is easy to infer, 5 impossible."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: Annotated[str, Field(min_length=1, max_length=MAX_QUOTE)]
    kind: Kind
    score: Annotated[int, Field(ge=1, le=MAX_SCORE)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    spans: Annotated[list[Quote], Field(max_length=MAX_SPANS)]


@dataclass(frozen=True)
class Prompt:
    """The judge's prompt; `sha256` is that of its text."""

    version: int
    sha256: str
    text: str


@dataclass(frozen=True)
class Verdicts:
    """What the judge says about D documents: S spans and U passages without a verdict, each in order of document.

    span_document       (S,) int32: the document of each span
    span_starts         (S,) int32, `span_ends` (S,) int32: half-open character offsets; spans of a passage stand in the
                        order in which the model named them, and may overlap
    span_scores         (S,) float32 in (0, 1]: how hard to infer, 1 for impossible
    unjudged_document   (U,) int32, `unjudged_starts`, `unjudged_ends` (U,) int32: the passages without a verdict, in
                        order of offset within a document
    windows_judged      passages with a verdict, an empty one included
    windows_unjudged    U
    spans               S
    spans_dropped       quotes that are not in their passage, or not as often as they are quoted
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
        """What is added up over the parts of a dataset."""
        names = ("windows_judged", "windows_unjudged", "spans", "spans_dropped")
        return {name: getattr(self, name) for name in names}


@lru_cache(maxsize=1)
def prompt() -> Prompt:
    """The prompt that the judge uses, as it is shipped."""
    data = resources.files("lacy.labelers").joinpath("judge_prompt.md").read_bytes()
    text = data.decode()
    return Prompt(int(text.partition("\n")[0].removeprefix("version:")), sha256(data).hexdigest(), text)


def judge(
    chat: Chat, texts: list[str], *, size: int = PASSAGE, context: int = CONTEXT, max_tokens: int = MAX_ANSWER
) -> Verdicts:
    """Have a model read documents and mark their spans.

    size, context  characters of a passage, and of the text before it that is read along (`passages`)
    max_tokens     of an answer

    All passages are asked about in one call, and those without a usable answer in a second. Raises what `chat` raises;
    a passage that cannot be judged raises nothing. A passage of white space is judged, unmarked, without asking.
    """
    windows = [(index, *window) for index, text in enumerate(texts) for window in passages(text, size, context)]
    answers: list[list[Quote] | None] = [[] for _ in windows]
    todo = [number for number, (index, _, start, end) in enumerate(windows) if not texts[index][start:end].isspace()]
    malformed: set[int] = set()
    for _ in range(2):
        conversations = []
        for number in todo:
            index, before, start, end = windows[number]
            conversations.append(
                conversation(texts[index][before:start], texts[index][start:end], again=number in malformed)
            )
        replies = chat.ask(conversations, SCHEMA, max_tokens) if todo else []
        for number, reply in zip(todo, replies, strict=True):
            answers[number] = None if reply.text is None else parse(reply.text)
            if reply.text is not None and answers[number] is None:
                malformed.add(number)
        todo = [number for number in todo if answers[number] is None]

    spans: list[tuple[int, int, int]] = []
    scores: list[float] = []
    unjudged: list[tuple[int, int, int]] = []
    dropped = 0
    for (index, _, start, end), quotes in zip(windows, answers, strict=True):
        if quotes is None:
            unjudged.append((index, start, end))
            continue
        places = locate(texts[index][start:end], [quote.text for quote in quotes])
        for quote, place in zip(quotes, places, strict=True):
            if place is None:
                dropped += 1
            else:
                spans.append((index, start + place[0], start + place[1]))
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


def conversation(before: str, passage: str, *, again: bool = False) -> list[dict[str, str]]:
    """What the model is told: the prompt around a passage and the text before it.

    again  the same once more, after an answer that was no JSON: greedy decoding would repeat the answer
    """
    system, user, reminder = _sections(prompt().text)
    fields = {"{{context}}": before.strip() or "(The text begins with the passage.)", "{{passage}}": passage.strip()}
    content = "".join(fields.get(piece, piece) for piece in user)
    if again:
        content = f"{content}\n\n{reminder}"
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def passages(text: str, size: int = PASSAGE, context: int = CONTEXT) -> list[tuple[int, int, int]]:
    """Cut a text into windows: (start of the context, start, end), in characters, half open.

    The passages `[start, end)` cover the text, each character once, and have at most `size` characters. Each but the
    last has more than half of that, and ends at the last paragraph, else sentence, else word that ends there; where
    none does, it is cut at `size`. The context before a passage has at most `context` characters, and begins with a
    word if one begins in its first half. Raises ValueError for a size below 1 or a context below 0.
    """
    if size < 1 or context < 0:
        raise ValueError(f"passages of {size} characters after {context} cannot be cut")
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
    fenced = _FENCE.fullmatch(answer)
    try:
        return _Answer.model_validate_json(fenced[1] if fenced else answer).spans
    except (ValidationError, UnicodeEncodeError):
        return None


def token_scores(verdicts: Verdicts, tokens: Tokens, texts: list[str]) -> np.ndarray:
    """The judge's score of each token of the documents that were judged: (T,) float32.

    It is that of the span that shares a character with the token, the highest where there are several; 0 in a passage
    that was judged, outside of spans; NaN in one that was not. A token belongs to the passage that holds its first
    character that is no white space, or, where it has none, its first character.
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
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_BORDERS = (
    re.compile(r"\n\s*"),
    re.compile(r"[.!?][\"')\]\u2019\u201d\u00bb]*\s+|[。！？][」』）]*\s*"),  # noqa: RUF001
    _WHITE_SPACE,
)


def _last_border(text: str, start: int, first: int, last: int) -> int:
    """Where the last paragraph, sentence or word from `start` on ends, if between `first` and `last`; else `last`."""
    for border in _BORDERS:
        ends = [match.end() for match in border.finditer(text, start, last)]
        if ends and ends[-1] >= first:
            return ends[-1]
    return last


@lru_cache(maxsize=1)
def _sections(text: str) -> tuple[str, list[str], str]:
    """The system text, the pieces of the user's with the fields apart, and what is added when asked again."""
    system, user, again = (section.strip() for section in re.split(r"^# .*$", text, flags=re.MULTILINE)[1:])
    return system, re.split(r"(\{\{\w+\}\})", user), again


def _offsets(ranges: list[tuple[int, int, int]]) -> np.ndarray:
    """(3, N) int32: document, start and end of each range."""
    return np.array(ranges, np.int32).reshape(-1, 3).T.copy()
