"""The larger models that answer calls: in this process, through `transformers` or vLLM, or on a server.

A partner continues several texts at once: with token ids if it tokenizes exactly as the small model does, else with
characters. Its next token may be part of a character, or a space alone, which the small model would write in one token
with the following word. The partner then writes a few more tokens at most, until there is something to join. With
`words`, it writes whole words, up to the white space behind them.
"""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import httpx
import numpy as np
import torch

from lacy.cascade.calls import forbid
from lacy.cascade.language_model import Model
from lacy.cascade.options import Sampling
from lacy.cascade.reader import Reader
from lacy.cascade.vocabulary import Vocabulary, incomplete, same
from lacy.labelers.llm.client import ClientThread
from lacy.schemas.errors import CascadeError

REST: Final = 4  # further tokens, if the last one ends within a character or before a word
WORD_TOKENS: Final = 8  # of one word, at most
MOST_BIASED: Final = 300  # tokens that a request can forbid
RETRY_SECONDS: Final = 0.5
PAUSE_SECONDS: Final = 60.0  # without requests to a partner that does not answer

_FAULTS: Final = (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Request:
    """A text that calls.

    slot   number that the text keeps while it grows, so that a partner may cache it
    text   its complete characters
    ids    the small model's tokens of it, without those that begin every text
    draw   a number in [0, 1) to sample with
    """

    slot: int
    text: str
    ids: list[int]
    draw: float = 0.0


@dataclass(frozen=True)
class Answer:
    """The continuation: `ids` if the partner has the small model's tokenizer, else `text`; or a failure.

    ended    whether the text ends behind it
    tokens   number of the partner's own tokens
    failure  why there is no answer, in one line
    gone     whether the failure is the partner's, whatever it is asked
    """

    text: str = ""
    ids: tuple[int, ...] | None = None
    ended: bool = False
    tokens: int = 0
    failure: str | None = None
    gone: bool = False


class Partner(Protocol):
    """A larger model.

    name    for people who read the output
    by_ids  whether answers are token ids; else they are characters, and a text cannot call in the middle of one
    """

    name: str
    by_ids: bool

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each request, in order. If it raises, no request is answered."""
        ...

    def close(self) -> None:
        """Free the model. Closing twice is harmless."""
        ...


@dataclass(frozen=True)
class Amount:
    """How much a partner writes for one call: a number of its tokens, or of words."""

    tokens: int = 1
    words: int | None = None

    @property
    def most(self) -> int:
        """The most tokens, apart from those that complete a character."""
        return self.tokens if self.words is None else WORD_TOKENS * self.words

    def cut(self, written: bytes) -> bytes | None:
        """The words asked for, once white space follows them; None before that, or without `words`."""
        if self.words is None:
            return None
        text = written[: len(written) - incomplete(written)].decode(errors="replace")
        match = re.match(rf"(?:\s*+\S++){{{self.words}}}(?=\s)", text)
        return match[0].encode() if match else None


class InProcess:
    """A partner in `transformers`, which caches the texts that it has read."""

    def __init__(
        self,
        model: Model,
        ours: Vocabulary,
        amount: Amount,
        sampling: Sampling,
        *,
        slots: int = 16,
        remember: bool = True,
    ):
        """`slots` is the number of texts that are written at a time."""
        self.name = str(model.folder)
        self._model, self._amount, self._sampling = model, amount, sampling
        self._same = same(ours, model.vocabulary)
        self.by_ids = self._same and amount.words is None
        self._forbidden = model.forbidden()
        self._reader: Reader | None = Reader(model, slots, remember=remember)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        assert self._reader is not None, "closed"
        texts = [self._ids(request) for request in requests]
        written: list[list[int]] = [[] for _ in requests]
        answers: dict[int, Answer] = {}
        for _ in range(self._amount.most + REST):
            unanswered = [i for i in range(len(requests)) if i not in answers]
            if not unanswered:
                break
            logits = self._reader.read(
                [requests[i].slot for i in unanswered], [self._window(texts[i]) for i in unanswered]
            )[:, -1]
            draws = np.array([_again(requests[i].draw, len(written[i])) for i in unanswered])
            tokens = pick(forbid(logits, *self._forbidden), self._sampling, draws)
            for i, token in zip(unanswered, tokens, strict=True):
                if token in self._model.end_ids:
                    answers[i] = self._answer(written[i], ended=True)
                    continue
                written[i].append(token)
                texts[i].append(token)
                data = self._bytes(written[i])
                cut = self._amount.cut(data)
                if cut is not None:
                    answers[i] = Answer(text=cut.decode(errors="replace"), tokens=len(written[i]))
                elif len(written[i]) >= self._amount.most and (self._same or not _dangling(data)):
                    answers[i] = self._answer(written[i])
        return [answers.get(i) or self._answer(written[i]) for i in range(len(requests))]

    def close(self) -> None:
        self._reader = None

    def _ids(self, request: Request) -> list[int]:
        return list(request.ids) if self._same else self._model.vocabulary.read(request.text)[0]

    def _window(self, ids: list[int]) -> list[int]:
        """The ids that the partner reads: the last half or more of a text that is longer than its context."""
        room = self._model.context - len(self._model.begin)
        half = room // 2
        over = max(0, len(ids) - room)
        return self._model.begun(ids[-(-over // half) * half :])

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(self._model.vocabulary.pieces[index] or b"" for index in ids)

    def _answer(self, ids: list[int], ended: bool = False) -> Answer:
        if self._same:
            return Answer(ids=tuple(ids), ended=ended, tokens=len(ids) + ended)
        return _characters(self._bytes(ids), ended, len(ids) + ended)


class Vllm:
    """A partner in a vLLM engine in this process, whose prefix cache keeps what it has read.

    `engine` is an open `vllm.LLM`, `vocabulary` that of its model.
    """

    def __init__(
        self, name: str, engine: Any, vocabulary: Vocabulary, begin: tuple[int, ...], ends: frozenset[int],
        ours: Vocabulary, amount: Amount, sampling: Sampling,
    ):  # fmt: skip
        self.name = name
        self._engine, self._vocabulary, self._begin = engine, vocabulary, begin
        self._same = same(ours, vocabulary)
        self.by_ids = self._same and amount.words is None
        self._amount, self._sampling = amount, sampling
        self._room = _room(engine.llm_engine.model_config.max_model_len, amount, begin, name)
        self._ends = ends
        rows = engine.llm_engine.model_config.get_vocab_size()
        self._bias = {index: -100.0 for index in vocabulary.forbidden(rows, ends)}

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        from vllm import SamplingParams

        answers: list[Answer | None] = [None] * len(requests)
        for more in range(REST + 1):
            unanswered = [i for i, answer in enumerate(answers) if answer is None]
            if not unanswered:
                break
            settings = [
                SamplingParams(
                    temperature=self._sampling.temperature,
                    top_p=self._sampling.top_p,
                    seed=_seed(requests[i].draw),
                    max_tokens=self._amount.most + more,
                    logit_bias=self._bias or None,
                    stop_token_ids=sorted(self._ends),
                    detokenize=False,
                )
                for i in unanswered
            ]
            prompts: Any = [{"prompt_token_ids": self._ids(requests[i])} for i in unanswered]
            outputs = self._engine.generate(prompts, settings, use_tqdm=False)
            for i, output in zip(unanswered, outputs, strict=True):
                best = output.outputs[0]
                ids = [token for token in best.token_ids if token < len(self._vocabulary.pieces)]
                answers[i] = self._read(ids, best.finish_reason == "stop", more == REST)
        return [answer or Answer(failure="no complete character") for answer in answers]

    def close(self) -> None:
        self._engine = None

    def _ids(self, request: Request) -> list[int]:
        ids = request.ids if self._same else self._vocabulary.read(request.text)[0]
        return [*self._begin, *ids[-self._room :]] or [min(self._ends, default=0)]

    def _read(self, ids: list[int], ended: bool, last: bool) -> Answer | None:
        texts = [i for i in ids if self._vocabulary.pieces[i] is not None]
        data = b"".join(self._vocabulary.pieces[i] or b"" for i in texts)
        cut = self._amount.cut(data)
        if cut is not None:
            return Answer(text=cut.decode(errors="replace"), tokens=len(ids))
        if self._same:
            return Answer(ids=tuple(texts), ended=ended, tokens=len(ids))
        if _dangling(data) and not ended and not last:
            return None
        return _characters(data, ended, len(ids))


class Server:
    """A partner on a server that speaks the OpenAI protocol (`/v1/completions`).

    url         base URL, without /v1
    model       the server's name of it; None: the only one that it has
    vocabulary  the tokenizer of the server's model, if known: if it is the small model's too, requests and answers are
                token ids (vLLM's `return_token_ids`); else they are characters
    begin, ends ids in front of a text, and ids that end one; if known, no other special token is written

    Raises CascadeError if the server does not answer, or has no such model.
    """

    def __init__(
        self, url: str, model: str | None, ours: Vocabulary, amount: Amount, sampling: Sampling, *,
        key: str | None = None, timeout: float = 30.0, vocabulary: Vocabulary | None = None,
        begin: tuple[int, ...] = (), ends: frozenset[int] = frozenset(), concurrency: int = 64,
    ):  # fmt: skip
        self.name = url
        self._url, self._amount, self._sampling = url, amount, sampling
        self._ours, self._begin = ours, begin
        self._same = vocabulary is not None and same(ours, vocabulary)
        self.by_ids = self._same and amount.words is None
        forbidden = vocabulary.forbidden(len(vocabulary.pieces), ends) if vocabulary else []
        if vocabulary and not ends:  # one of them may end a text
            forbidden = [] if vocabulary.call_id is None else [vocabulary.call_id]
        self._bias = {str(index): -100 for index in forbidden[:MOST_BIASED]}
        self._client = ClientThread(timeout=timeout, key=key, connections=concurrency)
        try:
            self._model, self._context = self._client.run(self._pick(model))
            if self._context is not None:
                self._room = _room(self._context, amount, begin, url)
        except BaseException:
            self.close()
            raise

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        async def ask() -> list[Answer]:
            return await asyncio.gather(*(self._ask(request) for request in requests))

        return self._client.run(ask())

    def close(self) -> None:
        self._client.close()

    async def _pick(self, wanted: str | None) -> tuple[str, int | None]:
        """The model's name, and its context if the server reports it."""
        try:
            listed = (await self._client.http.get(f"{self._url}/v1/models")).raise_for_status().json()
            contexts = {str(entry["id"]): entry.get("max_model_len") for entry in listed["data"]}
        except (*_FAULTS, ExceptionGroup) as error:
            raise CascadeError(
                f"no partner at {self._url} ({_line(error)}): start its server, or use another with --partner"
            ) from None
        name = next(iter(contexts)) if wanted is None and len(contexts) == 1 else wanted
        if name not in contexts:
            names = ", ".join(contexts) or "no model"
            raise CascadeError(f"{self._url} serves {names}: pass one of its models with --partner-model", usage=True)
        context = contexts[name]
        return name, context if isinstance(context, int) else None

    async def _ask(self, request: Request) -> Answer:
        try:
            for more in range(REST + 1):
                response = await self._client.http.post(f"{self._url}/v1/completions", json=self._body(request, more))
                if response.status_code != 200:
                    status, message = response.status_code, " ".join(response.text.split())[:200]
                    reason = f"{self._url} answered HTTP {status}: {message}"
                    return Answer(failure=reason, gone=status >= 500 or status == 429)
                answer = self._read(response.json(), more == REST)
                if answer is not None:
                    return answer
        except _FAULTS as error:
            return Answer(failure=f"{self._url}: {_line(error)}", gone=True)
        return Answer(failure="no complete character")

    def _body(self, request: Request, more: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            # after a replacement character, vLLM repeats the whole prompt
            "prompt": [*self._begin, *request.ids] if self._same else request.text.rstrip("\ufffd"),
            "max_tokens": self._amount.most + more,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "seed": _seed(request.draw),
        }
        if self._same:
            body["return_token_ids"] = True
        if self._bias:
            body["logit_bias"] = self._bias
        if self._context is not None:
            body["truncate_prompt_tokens"] = self._room
        return body

    def _read(self, answer: Any, last: bool) -> Answer | None:
        choice = answer["choices"][0]
        text, ended = choice["text"], choice.get("finish_reason") == "stop"
        if not isinstance(text, str):
            raise ValueError("no text in the answer")
        tokens = int((answer.get("usage") or {}).get("completion_tokens") or self._amount.most)
        cut = self._amount.cut(text.encode(errors="replace"))
        if cut is not None:
            return Answer(text=cut.decode(), tokens=tokens)
        ids = choice.get("token_ids")
        if self._same and isinstance(ids, list) and all(isinstance(i, int) for i in ids):
            written = [i for i in ids if 0 <= i < len(self._ours.pieces) and self._ours.pieces[i] is not None]
            return Answer(ids=tuple(written), ended=ended, tokens=tokens)
        whole = text.rstrip("\ufffd")  # which some servers write for the beginning of a character
        if (whole != text or not text or text.endswith(" ")) and not ended and not last:
            return None
        return _characters(whole.encode(errors="replace"), ended, tokens)


class Patient:
    """A partner that is asked once more when it fails, and gets a pause when it fails on all requests.

    Requests that fail through their own fault are not repeated. Until `pause_seconds` have passed, all requests fail at
    once.
    """

    def __init__(self, partner: Partner, *, retry_seconds: float = RETRY_SECONDS, pause_seconds: float = PAUSE_SECONDS):
        self.name, self.by_ids = partner.name, partner.by_ids
        self._partner = partner
        self._retry, self._pause = retry_seconds, pause_seconds
        self._not_before = 0.0
        self._reason = ""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """As `Partner.answer`, but without raising the partner's exceptions: they become failures."""
        if time.monotonic() < self._not_before:
            return [Answer(failure=self._reason, gone=True)] * len(requests)
        answers = self._once(requests)
        failed = [i for i, answer in enumerate(answers) if answer.gone]
        if failed:
            time.sleep(self._retry)
            for i, answer in zip(failed, self._once([requests[i] for i in failed]), strict=True):
                answers[i] = answer
        if answers and all(answer.gone for answer in answers):
            self._reason = answers[0].failure or ""
            self._not_before = time.monotonic() + self._pause
        return answers

    def close(self) -> None:
        self._partner.close()

    def _once(self, requests: Sequence[Request]) -> list[Answer]:
        try:
            return self._partner.answer(requests)
        except Exception as error:  # an engine that died may raise anything
            return [Answer(failure=_line(error), gone=True)] * len(requests)


def pick(logits: torch.Tensor, sampling: Sampling, draws: np.ndarray) -> list[int]:
    """A token for each row of logits (b, V): the likeliest, or sampled within top_p by the draws (b,) in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    chances, order = (logits.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = chances.cumsum(-1)
    kept = chances.where(total - chances < sampling.top_p, 0.0)
    total = kept.cumsum(-1)
    rank = (total <= torch.from_numpy(draws).to(total)[:, None] * total[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, rank.clamp(max=logits.shape[-1] - 1)).squeeze(-1).tolist()


def _characters(data: bytes, ended: bool, tokens: int) -> Answer:
    text = data[: len(data) - incomplete(data)].decode(errors="replace")
    if not text and not ended:
        return Answer(failure="no complete character")
    return Answer(text=text, ended=ended, tokens=tokens)


def _dangling(data: bytes) -> bool:
    return incomplete(data) > 0 or data.endswith(b" ")


def _again(draw: float, times: int) -> float:
    """The n-th further number in [0, 1) derived from one."""
    return draw if not times else float(np.random.default_rng([int(draw * 2**53), times]).random())


def _seed(draw: float) -> int:
    return int(draw * 2**31)


def _room(context: int, amount: Amount, begin: tuple[int, ...], name: str) -> int:
    """The number of a text's tokens that a partner can read."""
    room = context - amount.most - REST - len(begin)
    if room < 1:
        raise CascadeError(f"{name} reads only {context} tokens: ask for shorter answers with --partner-tokens")
    return room


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
