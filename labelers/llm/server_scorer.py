"""The scorer on servers that speak the OpenAI protocol: for a model that is already served, or on other machines.

Token ids go to `/v1/completions`, several windows per request, and the log-probabilities of the prompt come back.
Servers offer two ways to ask for them, tried on two tokens when the scorer is created:

- `prompt_logprobs`, vLLM's own: for each token its id, log-probability and rank. It is tried first: on vLLM its answers
  take 80 bytes per token and 2.3 microseconds to read, those of `echo` 268 and 6.7, and the numbers are the same.
- `echo` with `logprobs`, the classic one: the prompt as if it had been generated. Tokens come as ids if the server can
  do that (`return_tokens_as_token_ids`); otherwise only their number is checked.

Scores are stored by document and position, so neither the order nor the repetition of requests changes them. For equal
numbers whatever else a server does, serve the model in float32 and without prefix caching.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lacy.labelers.llm.model_folders import text_config
from lacy.labelers.llm.scorer import MAX_DEFAULT_WINDOW, Scores, Span, fault_of, finish, plan_spans, settle_window
from lacy.labelers.llm.servers import BadAnswerError, Body, Refused, ServerPool, pick_model
from lacy.labelers.llm.windows import slices
from lacy.schemas.errors import ModelError

REQUEST_TOKENS = 4096  # in one request, over all its windows
REQUEST_PROMPTS = 32
IMPOSSIBLE = -9998.0  # nats; servers write -inf as -9999, which JSON can hold
PATH = "/v1/completions"

ECHO = {"echo": True, "logprobs": 1}  # not 0, which some servers take for none; 1 also gives the most likely token
WAYS: tuple[tuple[str, Body], ...] = (
    ("prompt_logprobs", {"max_tokens": 1, "prompt_logprobs": 0}),
    ("echo", {"max_tokens": 0, "return_tokens_as_token_ids": True, **ECHO}),
    ("echo", {"max_tokens": 1, "return_tokens_as_token_ids": True, **ECHO}),
    ("echo", {"max_tokens": 0, **ECHO}),
    ("echo", {"max_tokens": 1, **ECHO}),
)

Answer = list[tuple[np.ndarray, np.ndarray | None]]  # per prompt: NLL of all tokens but the first, whether each is top


class ServerScorer:
    """An LLM on servers; see `lacy.labelers.llm.scorer.Scorer` for the protocol and `ServerPool` for other settings.

    model        name or folder whose config gives the context and the vocabulary
    window       tokens per prompt, including BOS; default: what model and servers allow, at most 2048
    served_name  the servers' name of the model; default: `model` if they have it, else their only one
    vocabulary   number of ids that the model knows; if given, no config is read and the servers report the context
    way          "prompt_logprobs" or "echo"; default: the first that works

    Raises `ModelError` if model, servers or settings do not fit each other, or if no server answers.
    """

    def __init__(
        self,
        model: str,
        *,
        servers: list[str],
        window: int | None = None,
        overlap: int | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        patience: float = 300.0,
        backoff: float = 0.5,
        bos: int | None = None,
        served_name: str | None = None,
        vocabulary: int | None = None,
        way: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        context = None
        if vocabulary is None:
            context, vocabulary = _config(model, trust_remote_code)
        self.vocabulary, self.bos = vocabulary, bos
        if bos is not None and not 0 <= bos < vocabulary:
            raise ValueError(f"BOS id {bos} is outside the model's {vocabulary} tokens")
        self.pool = ServerPool(servers, concurrency=concurrency, timeout=timeout, patience=patience, backoff=backoff)
        try:
            self.name, served = pick_model(self.pool, served_name or model, exact=served_name is not None)
            lengths = [length for length in (context, served) if length is not None]
            self.window, self.overlap = _window(lengths, window, overlap, bos)
            self._agree(way)
        except BaseException:
            self.pool.close()
            raise
        self.path = f"server {self.way}"

    def score(self, documents: list[np.ndarray], on_tokens: Callable[[int], None] | None = None) -> list[Scores]:
        faults = [fault_of(document, self.vocabulary) for document in documents]
        nll = [np.full(document.size, np.nan, dtype=np.float32) for document in documents]
        correct = [np.zeros(document.size, dtype=bool) for document in documents] if self.ranked else None
        spans = plan_spans(documents, faults, self.window, self.overlap, self.bos)
        groups = self._groups(spans)
        refused: list[list[Span]] = []

        def done(index: int, answer: Answer | Refused) -> None:
            group = groups[index]
            if isinstance(answer, Refused):
                if len(group) > 1:
                    refused.append(group)
                else:
                    faults[group[0].document] = answer.reason
                return
            for span, (values, top) in zip(group, answer, strict=True):
                first = span.score_from - span.end  # counted from the end
                nll[span.document][span.score_from : span.end] = values[first:]
                if correct is not None and top is not None:
                    correct[span.document][span.score_from : span.end] = top[first:]
            if on_tokens:
                on_tokens(sum(span.end - span.score_from for span in group))

        while groups:  # until no group is left to halve
            bodies = (self._body(documents, group) for group in groups)
            self.pool.post_all(PATH, bodies, self._read, done)
            groups = [half for group in refused for half in _halves(group, faults)]
            refused.clear()
        return finish(nll, correct, faults)

    def close(self) -> None:
        """Close the connections; the servers keep running. Closing twice is harmless."""
        self.pool.close()

    def _groups(self, spans: list[Span]) -> list[list[Span]]:
        """Consecutive spans for one request each, small enough that every server gets some."""
        sizes = [span.end - span.begin for span in spans]
        most = min(REQUEST_TOKENS, -(-sum(sizes) // len(self.pool.urls)))
        sizes = [max(size, -(-most // REQUEST_PROMPTS)) for size in sizes]
        return [spans[begin:end] for begin, end in slices(sizes, most)]

    def _body(self, documents: list[np.ndarray], group: list[Span]) -> Body:
        lead = [] if self.bos is None else [self.bos]
        return self._request([lead + documents[span.document][span.begin : span.end].tolist() for span in group])

    def _request(self, prompts: list[list[int]]) -> Body:
        return {"model": self.name, "prompt": prompts, "temperature": 0, **self._parameters}

    def _agree(self, way: str | None) -> None:
        """Choose `way`, the request's parameters and `ranked`: whether answers include the most likely token."""
        reason = f"unknown way {way!r} to ask: use prompt_logprobs or echo"
        for name, parameters in WAYS:
            if way not in (None, name):
                continue
            self.way, self._parameters, self.ranked = name, parameters, False
            (answer,) = self.pool.post_all(PATH, [self._request([[0, 1]])], self._try)
            if isinstance(answer, bool):
                self.ranked = answer
                return
            reason = answer if isinstance(answer, str) else answer.reason
        raise ModelError(
            f"no server returns log-probabilities of a prompt: serve the model with vLLM, which does ({reason})"
        )

    def _try(self, answer: Any, body: Body) -> bool | str:
        """Whether answers include the most likely token, or why this way does not work."""
        try:
            ((_, top),) = self._read(answer, body)
        except BadAnswerError as error:
            return str(error)
        return top is not None

    def _read(self, answer: Any, body: Body) -> Answer:
        """The scores in an answer, checked against the prompts; raises `BadAnswerError` for anything else."""
        prompts = body["prompt"]
        read = _read_prompt_logprobs if self.way == "prompt_logprobs" else _read_echo
        try:
            choices = {choice["index"]: choice for choice in answer["choices"]}
            if sorted(choices) != list(range(len(prompts))):
                raise BadAnswerError(f"choices {sorted(choices)} for {len(prompts)} prompts")
            scores = [read(choices[index], prompt, body["max_tokens"]) for index, prompt in enumerate(prompts)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BadAnswerError(f"no log-probabilities of the prompt ({type(error).__name__}: {error})") from None
        if self.ranked and any(top is None for _, top in scores):
            raise BadAnswerError("no ranks, which earlier answers had")
        return scores


def _read_prompt_logprobs(choice: Any, prompt: list[int], _: int) -> tuple[np.ndarray, np.ndarray | None]:
    entries = choice["prompt_logprobs"]
    if len(entries) != len(prompt):
        raise BadAnswerError(f"{len(entries)} log-probabilities for {len(prompt)} tokens")
    wanted = []
    for entry, token in zip(entries[1:], prompt[1:], strict=True):
        if str(token) not in entry:
            raise BadAnswerError(f"log-probabilities of other tokens than {token}")
        wanted.append(entry[str(token)])
    ranks = [entry.get("rank") for entry in wanted]
    return _nll([entry["logprob"] for entry in wanted]), None if None in ranks else np.array(ranks) == 1


def _read_echo(choice: Any, prompt: list[int], generated: int) -> tuple[np.ndarray, np.ndarray | None]:
    logprobs = choice["logprobs"]
    values, tokens = logprobs["token_logprobs"], logprobs.get("tokens")
    if not len(prompt) <= len(values) <= len(prompt) + generated:
        raise BadAnswerError(f"{len(values)} log-probabilities for {len(prompt)} tokens")
    if tokens and all(str(token).startswith("token_id:") for token in tokens):
        ids = [int(token.removeprefix("token_id:")) for token in tokens]
        if ids[: len(prompt)] != prompt:
            raise BadAnswerError("log-probabilities of other tokens")
    nll = _nll(values[1 : len(prompt)])
    tops = (logprobs.get("top_logprobs") or [])[1 : len(prompt)]
    if len(tops) < len(nll) or not all(tops):
        return nll, None
    return nll, np.array([value >= max(top.values()) for value, top in zip(values[1:], tops, strict=False)])


def _nll(logprobs: list[float]) -> np.ndarray:
    if None in logprobs:
        raise BadAnswerError("a token without a log-probability")
    values = np.array(logprobs, dtype=np.float64)
    return np.where(values <= IMPOSSIBLE, np.inf, -values).astype(np.float32)


def _halves(group: list[Span], faults: list[str | None]) -> list[list[Span]]:
    """A group in two halves, without the documents that have been given up."""
    left = [span for span in group if faults[span.document] is None]
    middle = (len(left) + 1) // 2
    return [half for half in (left[:middle], left[middle:]) if half]


def _config(model: str, trust_remote_code: bool) -> tuple[int | None, int]:
    """Context (None: unbounded) and vocabulary of a model, both in tokens."""
    config = text_config(model, trust_remote_code=trust_remote_code)
    return getattr(config, "max_position_embeddings", None), config.vocab_size


def _window(lengths: list[int], window: int | None, overlap: int | None, bos: int | None) -> tuple[int, int]:
    """`window` and `overlap`, checked against the contexts of model and servers, one token of which is generated."""
    most = min(lengths) - 1 if lengths else None
    if window is not None and most is not None and window > most:
        raise ModelError(
            f"window {window} does not fit: model and servers take {most + 1} tokens, of which one is generated: set "
            f"the window to {most} or less"
        )
    if window is None and most is not None:
        window = min(most, MAX_DEFAULT_WINDOW)
    return settle_window(None, window, overlap, bos)
