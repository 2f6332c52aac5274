"""Scoring by a reference LLM: token ids in, one negative log-likelihood per token out.

A scorer never sees text or a tokenizer, and its result depends on the documents of the one call alone.
`lacy.labelers.llm.load.scorer` loads a backend. What backends share is here too: windows, checks, assembling results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lacy.labelers.llm.model_folders import text_config
from lacy.labelers.llm.windows import windows
from lacy.schemas.errors import ModelError

GPU_MEMORY_SHARE = 0.85  # of vLLM's engines; the rest is for the logits, which vLLM leaves out when it sizes its cache
MAX_DEFAULT_WINDOW = 2048  # tokens; attention makes longer windows expensive, and few documents are longer


@dataclass(frozen=True)
class Scores:
    """The scores of one document of T tokens.

    nll      (T,) float32, nats: -log p(token | tokens before it in its window). NaN at position 0, which has no
             context; NaN everywhere if `error` is set
    correct  (T,) bool: no token was more likely than this one. False at position 0; None where the backend cannot tell
    error    why this document could not be scored, or None
    fatal    whether the engine died of this document
    """

    nll: np.ndarray
    correct: np.ndarray | None
    error: str | None = None
    fatal: bool = False


class Scorer(Protocol):
    """A loaded reference LLM."""

    path: str  # how it gets its scores, for the record: a backend may have several ways

    def score(self, documents: list[np.ndarray], on_tokens: Callable[[int], None] | None = None) -> list[Scores]:
        """One `Scores` per document, in order; a document is a (T,) array of integer token ids, without BOS.

        A document that cannot be scored (an id outside the vocabulary, not a one-dimensional integer array, scores
        that are not finite) has its `error` set and does not affect the others. Faults of the model itself raise.
        `on_tokens` is called now and then with the number of tokens scored since the last call.
        """
        ...

    def close(self) -> None:
        """Free the model; the scorer cannot be used after it. Closing twice is harmless."""
        ...


@dataclass(frozen=True)
class Span:
    """One window of one document; the scores taken from it are those of the tokens `[score_from, end)`."""

    document: int
    begin: int
    end: int
    score_from: int


def plan_spans(
    documents: list[np.ndarray], faults: list[str | None], window: int, overlap: int, bos: int | None
) -> list[Span]:
    """The windows of all documents without a fault, in order. A BOS takes up one token of each window."""
    size = window - (bos is not None)
    return [
        Span(index, *piece)
        for index, (document, fault) in enumerate(zip(documents, faults, strict=True))
        if fault is None
        for piece in windows(len(document), size, overlap)
    ]


def fault_of(document: np.ndarray, vocabulary: int) -> str | None:
    """Why a model with `vocabulary` tokens cannot score a document, or None."""
    if document.ndim != 1 or not (np.issubdtype(document.dtype, np.integer) or not document.size):
        return f"token ids must be one row of integers, got {document.dtype} of shape {document.shape}"
    outside = (document < 0) | (document >= vocabulary)
    if outside.any():
        position = int(outside.argmax())
        return f"token id {document[position]} at position {position} is outside the reference's {vocabulary} tokens"
    return None


def settle_window(context: int | None, window: int | None, overlap: int | None, bos: int | None) -> tuple[int, int]:
    """`window` and `overlap` with their defaults, checked against the model's context (None: unbounded)."""
    if window is None:
        window = min(context or MAX_DEFAULT_WINDOW, MAX_DEFAULT_WINDOW)
    if context is not None and window > context:
        raise ValueError(f"window {window} is longer than the model's context of {context} tokens")
    size = window - (bos is not None)
    if size < 2:
        raise ValueError(f"window {window} is too short to score a token in context")
    if overlap is None:
        overlap = max(1, size // 4)
    windows(0, size, overlap)  # raises if they do not fit
    return window, overlap


def check_window(
    model: str, window: int, overlap: int | None, bos: int | None, *, trust_remote_code: bool = False
) -> None:
    """Raise ModelError, before any model is loaded, if the model's context is too short for the window."""
    config = text_config(model, trust_remote_code=trust_remote_code)
    try:
        settle_window(getattr(config, "max_position_embeddings", None), window, overlap, bos)
    except ValueError as error:
        raise ModelError(str(error), usage=True) from None


def spare_window(model: str, *, trust_remote_code: bool = False) -> int:
    """The default window of a scorer that must generate a token: one less than the context, at most 2048 tokens."""
    config = text_config(model, trust_remote_code=trust_remote_code)
    context = getattr(config, "max_position_embeddings", None) or MAX_DEFAULT_WINDOW + 1
    return min(context - 1, MAX_DEFAULT_WINDOW)


def finish(nll: list[np.ndarray], correct: list[np.ndarray] | None, faults: list[str | None]) -> list[Scores]:
    """`Scores` from filled arrays. Scores that are not finite are a fault of their document."""
    done = []
    for index, (values, fault) in enumerate(zip(nll, faults, strict=True)):
        if fault is None and not np.isfinite(values[1:]).all():
            position = 1 + int((~np.isfinite(values[1:])).argmax())
            fault = f"the reference gives {values[position]} nats at position {position}"
        if fault is None:
            done.append(Scores(values, None if correct is None else correct[index]))
        else:
            done.append(Scores(np.full_like(values, np.nan), None, fault))
    return done
