"""Generation with delegation: the small model writes, and where it calls, the partner writes instead.

    for generation in generate(model, ["Odra Venn was born in"], partner, Options(budget=0.22)):
        print(generation.text, [token.by for token in generation.tokens])

At each position of a text the small model reads the text so far, and its call score is compared with a threshold
(`lacy.cascade.calls`). Below it the small model writes its own likeliest token, except <CALL> and other tokens without
text; above it the partner is asked, and its answer becomes tokens of the small model (`lacy.cascade.vocabulary`).

Texts are written side by side in `batch` slots; one that ends makes room for the next. A text depends on its prompt,
the options and, if tokens are sampled, its index among the prompts; never on the other texts.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from lacy.cascade.calls import WINDOW, Fixed, Quantile, Scores, forbid, scores
from lacy.cascade.language_model import Model
from lacy.cascade.options import BUDGET
from lacy.cascade.options import GenerateOptions as Options
from lacy.cascade.partners import Answer, Partner, Request, pick
from lacy.cascade.reader import Reader
from lacy.cascade.vocabulary import Writing, incomplete
from lacy.schemas.errors import CascadeError

NEW_TEXTS = 8  # first read at a time: the logits of their warm-up are large
MOST_MISSED = 0.01  # share of failed calls that an evaluation accepts
PROMPT, SLM, PARTNER = range(3)  # authors
_SCORES = ("margin", "uncertainty", "score")
Finish = Literal["end", "length", "context"]
Author = Literal["slm", "partner", "both"]


class Token(BaseModel):
    """A token of the small model's vocabulary, behind the prompt.

    text    characters that it completes; those of all tokens make up the text
    by      their author; "both" if the token has characters of the small model and of the partner
    margin, uncertainty, score  at the position where it was written; None for further tokens of an answer
    called  whether the partner was asked there
    missed  whether that call failed
    """

    model_config = ConfigDict(frozen=True)

    id: int
    text: str
    by: Author
    margin: float | None = None
    uncertainty: float | None = None
    score: float | None = None
    called: bool = False
    missed: bool = False


class Generation(BaseModel):
    """The continuation of a prompt.

    finish          "end": the text ended by itself; "length": it has the number of tokens asked for (the partner's last
                    answer may exceed it); "context": the small model cannot read more
    positions       number of positions decided; `calls` of them asked the partner, `missed` of the calls failed
    partner_tokens  tokens of the partner's own tokenizer
    seconds         from its first token to its last, including work on the texts beside it
    partner_seconds of these, spent waiting for the partner
    failure         why the last failed call failed
    """

    model_config = ConfigDict(frozen=True)

    index: int
    prompt: str
    text: str
    tokens: list[Token]
    finish: Finish
    positions: int
    calls: int
    missed: int
    partner_tokens: int
    seconds: float
    partner_seconds: float
    failure: str | None = None


@dataclass(frozen=True)
class Piece:
    """Characters as they are written; `missed` if the partner should have written them."""

    index: int
    text: str
    by: Author
    missed: bool = False


@dataclass
class _Decision:
    offset: int  # bytes of text before it
    margin: float
    uncertainty: float
    score: float
    called: bool
    missed: bool = False


@dataclass
class _Text:
    """A text in progress."""

    index: int
    prompt: str
    slot: int
    writing: Writing
    rule: Quantile | Fixed | None
    random: np.random.Generator
    began: float
    prompt_bytes: int
    prompt_ids: int
    decisions: list[_Decision]
    shown: int  # bytes that `on_piece` has received
    partner_tokens: int = 0
    partner_seconds: float = 0.0
    failure: str | None = None
    finish: Finish | None = None
    ended_by: int | None = None  # author of the end token


def generate(
    model: Model,
    prompts: Sequence[str],
    partner: Partner | None,
    options: Options,
    *,
    on_piece: Callable[[Piece], None] | None = None,
    remember: bool = True,
) -> Iterator[Generation]:
    """Continue prompts; yields each text when it ends, not in the order of the prompts (`Generation.index`).

    partner   None: calls are forbidden. Wrap it in `lacy.cascade.partners.Patient`, which does not raise
    on_piece  receives characters as they are written
    remember  cache keys and values; otherwise each step reads all texts again

    Raises CascadeError if the score needs <CALL> and the model has none, and for a prompt that is not valid Unicode.
    """
    if partner is not None and model.call_id is None and options.call_score != "uncertainty":
        raise CascadeError(f"{model.folder} has no <CALL>: use --call-score uncertainty, or --partner none", usage=True)
    reader = Reader(model, min(options.batch, max(1, len(prompts))), remember=remember)
    forbidden = model.forbidden()
    waiting = iter(enumerate(prompts))
    free = list(range(min(options.batch, len(prompts))))
    texts: list[_Text] = []
    while True:
        fresh: list[_Text] = []
        while free and (item := next(waiting, None)) is not None:
            text = _begin(model, *item, free[0], options)
            if text.finish:
                yield _generation(model, text)
                continue
            free.pop(0)
            fresh.append(text)
        old, texts = texts, texts + fresh
        if not texts:
            return
        groups = [old, *(fresh[first : first + NEW_TEXTS] for first in range(0, len(fresh), NEW_TEXTS))]
        logits = [row for group in groups if group for row in _read(model, reader, group, partner, options)]
        _step(model, texts, torch.stack(logits), partner, options, forbidden)
        for text in texts:
            _show(text, on_piece)
            if text.finish:
                free.append(text.slot)
                yield _generation(model, text)
        texts = [text for text in texts if not text.finish]
        free.sort()


def require_answered(texts: Sequence[Generation]) -> None:
    """Raise CascadeError if more than MOST_MISSED of the calls failed: the figures would not be those of a cascade."""
    calls, missed = sum(text.calls for text in texts), sum(text.missed for text in texts)
    if missed > MOST_MISSED * calls:
        reason = next(text.failure for text in texts if text.failure)
        raise CascadeError(f"{missed:,} of {calls:,} calls failed ({reason}): rerun the same command to measure again")


def _begin(model: Model, index: int, prompt: str, slot: int, options: Options) -> _Text:
    try:
        writing = Writing(model.vocabulary, prompt)
    except (UnicodeEncodeError, TypeError):
        raise CascadeError(f"prompt {index + 1} is not valid Unicode: {prompt!r:.80}") from None
    text = _Text(
        index=index,
        prompt=prompt,
        slot=slot,
        writing=writing,
        rule=None,
        random=np.random.default_rng([options.seed, index]),
        began=time.monotonic(),
        prompt_bytes=len(writing.data),
        prompt_ids=len(writing.ids),
        decisions=[],
        shown=len(writing.data),
    )
    if len(model.begun(writing.ids)) > model.context:
        text.finish = "context"
    return text


def _read(
    model: Model, reader: Reader, texts: list[_Text], partner: Partner | None, options: Options
) -> Iterator[torch.Tensor]:
    """(V,) logits behind each text. A text that is read for the first time gets its rule from its prompt's scores."""
    is_new = texts[0].rule is None
    last = WINDOW + 1 if is_new and partner is not None and options.threshold is None else 1
    logits = reader.read([t.slot for t in texts], [model.begun(t.writing.ids) for t in texts], last)
    if is_new:
        for text, rows in zip(texts, logits, strict=True):
            if partner is None:
                text.rule = Fixed(math.inf)
            elif options.threshold is not None:
                text.rule = Fixed(options.threshold)
            else:
                read = rows[:-1][~rows[:-1, 0].isnan()]
                seen = scores(read, model.call_id).of(options.call_score, options.weight)
                text.rule = Quantile(BUDGET if options.budget is None else options.budget, seen)
    return iter(logits[:, -1])


def _step(
    model: Model,
    texts: list[_Text],
    logits: torch.Tensor,
    partner: Partner | None,
    options: Options,
    forbidden: list[int],
) -> None:
    """Write one position of each text, given the logits (b, V) behind it."""
    called = _decide(texts, scores(logits, model.call_id), partner, options)
    draws = np.array([text.random.random() for text in texts])
    answers: dict[int, Answer] = {}
    asked = [i for i, call in enumerate(called) if call]
    if asked and partner is not None:
        began = time.monotonic()
        requests = [Request(texts[i].slot, texts[i].writing.text, texts[i].writing.ids, float(draws[i])) for i in asked]
        answers = dict(zip(asked, partner.answer(requests), strict=True))
        for i in asked:
            texts[i].partner_seconds += time.monotonic() - began
    own = pick(forbid(logits, *forbidden), options.sampling, draws)
    for i, text in enumerate(texts):
        answer = answers.get(i)
        if answer is not None and _join(model, text, answer):
            continue
        if answer is not None:  # a failed call
            text.decisions[-1].missed = True
            text.failure = answer.failure or "an empty answer"
        text.writing.add(own[i], SLM)
        if own[i] in model.end_ids:
            text.finish, text.ended_by = "end", SLM
    for text in texts:
        if text.finish is None and len(text.writing.ids) - text.prompt_ids >= options.max_new_tokens:
            text.finish = "length"
        if text.finish is None and len(model.begun(text.writing.ids)) > model.context:
            text.finish = "context"


def _decide(texts: list[_Text], positions: Scores, partner: Partner | None, options: Options) -> list[bool]:
    """Whether each text calls; never in the middle of a character if the partner answers with characters."""
    score = positions.of(options.call_score, options.weight)
    for i, text in enumerate(texts):
        assert text.rule is not None, "made when the prompt was read"
        may = partner is not None and (partner.by_ids or not text.writing.mid_character)
        called = text.rule.decide(score[i], may)
        values = float(positions.margin[i]), float(positions.uncertainty[i]), float(score[i])
        text.decisions.append(_Decision(len(text.writing.data), *values, called))
    return [text.decisions[-1].called for text in texts]


def _join(model: Model, text: _Text, answer: Answer) -> bool:
    """Append an answer; False if it is empty or a failure."""
    if answer.failure or not (answer.ids or answer.text or answer.ended):
        return False
    text.partner_tokens += answer.tokens
    if answer.ids is not None:
        for token in answer.ids:
            text.writing.add(token, PARTNER)
    elif answer.text:
        text.writing.join(answer.text, PARTNER)
    if answer.ended:
        text.finish = "end"
        if model.end_id is not None:
            text.writing.add(model.end_id, PARTNER)
            text.ended_by = PARTNER
    return True


def _show(text: _Text, on_piece: Callable[[Piece], None] | None) -> None:
    """Pass on the new complete characters; all bytes that are left once the text has ended."""
    data = text.writing.data
    until = len(data) if text.finish else len(data) - incomplete(data)
    if on_piece is None or until <= text.shown:
        return
    piece = bytes(data[text.shown : until]).decode(errors="replace")
    by = _by(text.writing.authors[text.shown : until], SLM)
    on_piece(Piece(text.index, piece, by, text.decisions[-1].missed))
    text.shown = until


def _by(authors: bytes | bytearray, default: int) -> Author:
    """The author of some bytes; `default` if there are none."""
    writers = set(authors) - {PROMPT} or {default}
    return "both" if len(writers) > 1 else "partner" if PARTNER in writers else "slm"


def _generation(model: Model, text: _Text) -> Generation:
    writing, decisions = text.writing, text.decisions
    return Generation(
        index=text.index,
        prompt=text.prompt,
        text=bytes(writing.data[text.prompt_bytes :]).decode(errors="replace"),
        tokens=_tokens(model, text),
        finish=text.finish or "length",
        positions=len(decisions),
        calls=sum(decision.called for decision in decisions),
        missed=sum(decision.missed for decision in decisions),
        partner_tokens=text.partner_tokens,
        seconds=time.monotonic() - text.began,
        partner_seconds=text.partner_seconds,
        failure=text.failure,
    )


def _tokens(model: Model, text: _Text) -> list[Token]:
    """The tokens with characters behind the prompt, each with the last decision made in it."""
    writing = text.writing
    first = next((i for i, end in enumerate(writing.ends) if end > text.prompt_bytes), len(writing.ends))
    if text.ended_by is not None and first == len(writing.ends):
        first -= 1  # the end token alone
    ends = np.array(writing.ends[first:], np.int64)
    starts = np.concatenate([[text.prompt_bytes], ends[:-1]]) if len(ends) else ends
    decided = dict(
        zip(np.searchsorted(ends, [d.offset for d in text.decisions], side="right"), text.decisions, strict=True)
    )
    if text.ended_by is not None and text.decisions[-1].offset == len(writing.data):
        decided[len(ends) - 1] = text.decisions[-1]  # the end token has no bytes
    data = bytes(writing.data)
    tokens = []
    shown = text.prompt_bytes
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        until = len(data) if i == len(ends) - 1 else end - _open(data, int(end))
        until = max(until, shown)
        decision = decided.get(i)
        values = {} if decision is None else {name: getattr(decision, name) for name in _SCORES}
        tokens.append(
            Token(
                id=writing.ids[first + i],
                text=data[shown:until].decode(errors="replace"),
                by=_by(writing.authors[start:end], text.ended_by or SLM),
                called=bool(decision and decision.called),
                missed=bool(decision and decision.missed),
                **{name: value for name, value in values.items() if math.isfinite(value)},
            )
        )
        shown = until
    return tokens


def _open(data: bytes, end: int) -> int:
    """The number of bytes before `end` that begin a character which is completed behind it."""
    return incomplete(data[max(0, end - 4) : end]) if end < len(data) and data[end] & 0xC0 == 0x80 else 0
