"""Scoring by a reference LLM: token ids in, one negative log-likelihood per token out.

A scorer never sees text or a tokenizer, and its result depends on nothing but the documents of the one call. Backends
are loaded by `load`; neither torch nor vLLM is imported before that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from lacy.labelers.llm.models import text_config
from lacy.labelers.llm.windows import windows
from lacy.schemas.errors import ModelError

GPU_MEMORY_SHARE = 0.85  # of vLLM's engines; the rest is for the logits, which vLLM leaves out when it sizes its cache
MAX_DEFAULT_WINDOW = 2048  # tokens; attention makes longer windows dear, and few documents are longer


@dataclass(frozen=True)
class Scores:
    """What a reference says about one document of T tokens.

    nll      (T,) float32, nats: -log p(token | tokens before it in its window). NaN at position 0, which has no
             context; NaN everywhere where `error` is set
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

    path: str  # how it gets its scores, for the record: a backend can have several ways

    def score(self, documents: list[np.ndarray], on_tokens: Callable[[int], None] | None = None) -> list[Scores]:
        """One `Scores` per document, in order; a document is a (T,) array of integer token ids, without BOS.

        A document that cannot be scored (an id outside the vocabulary, not a one-dimensional integer array, scores
        that are not finite) has its `error` set, and does not touch the others. What concerns the model and not a
        document raises. `on_tokens` is told, now and then, how many more tokens have a score.
        """
        ...

    def close(self) -> None:
        """Free the model; the scorer cannot be used after it. Closing twice is harmless."""
        ...


def load(
    scorer: Literal["transformers", "vllm", "server"],
    model: str,
    *,
    dtype: str = "auto",
    window: int | None = None,
    overlap: int | None = None,
    max_batch_tokens: int | None = None,
    device: str = "auto",
    threads: int = 1,
    bos: int | None = None,
    trust_remote_code: bool = False,
    **engine: Any,
) -> Scorer:
    """Load `model` (a folder, a hub name, or the name of an embedded model) for scoring.

    dtype             "auto" is float32 on a CPU and bfloat16 on a GPU; else the name of a torch dtype
    window            tokens per forward pass; default: the model's context, at most 2048
    overlap           least context of a token after the first window; default: a quarter of the window
    max_batch_tokens  tokens per forward pass over all documents, padding included (transformers), or per scheduler
                      step (vllm); the default suits the device
    device            "auto" is "cuda" where there is one, else "cpu" (transformers only)
    threads           CPU threads; with one, equal calls give equal bytes whatever else the machine does
    bos               id put before each window, for models that were trained with one; it is never in the output
    engine            further arguments of the vLLM engine, or of `lacy.labelers.llm.server_scorer.ServerScorer`

    Raises `ModelError` when the model or the backend's package is missing, `ValueError` for settings that cannot be.
    """
    if scorer == "transformers":
        if engine:
            raise ValueError(f"the transformers scorer has no setting {', '.join(engine)}")
        from lacy.labelers.llm.transformers_scorer import TransformersScorer

        return TransformersScorer(
            model,
            dtype=dtype,
            window=window,
            overlap=overlap,
            max_batch_tokens=max_batch_tokens,
            device=device,
            threads=threads,
            bos=bos,
            trust_remote_code=trust_remote_code,
        )
    if scorer == "server":
        from lacy.labelers.llm.server_scorer import ServerScorer

        return ServerScorer(
            model, window=window, overlap=overlap, bos=bos, trust_remote_code=trust_remote_code, **engine
        )
    if scorer == "vllm":
        from lacy.labelers.llm.vllm_scorer import VllmScorer

        return VllmScorer(
            model,
            dtype=dtype,
            window=window,
            overlap=overlap,
            max_batch_tokens=max_batch_tokens,
            threads=threads,
            bos=bos,
            trust_remote_code=trust_remote_code,
            **engine,
        )
    raise ValueError(f"no scorer {scorer!r}; known: transformers, vllm, server")


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
    """The windows of all documents without a fault, in order; a BOS takes one token of each window."""
    size = window - (bos is not None)
    return [
        Span(index, *piece)
        for index, (document, fault) in enumerate(zip(documents, faults, strict=True))
        if fault is None
        for piece in windows(len(document), size, overlap)
    ]


def fault_of(document: np.ndarray, vocabulary: int) -> str | None:
    """Why a document cannot be scored by a model of `vocabulary` tokens, or None."""
    if document.ndim != 1 or not (np.issubdtype(document.dtype, np.integer) or not document.size):
        return f"token ids must be one row of integers, got {document.dtype} of shape {document.shape}"
    outside = (document < 0) | (document >= vocabulary)
    if outside.any():
        position = int(outside.argmax())
        return f"token id {document[position]} at position {position} is outside the reference's {vocabulary} tokens"
    return None


def settle_window(context: int | None, window: int | None, overlap: int | None, bos: int | None) -> tuple[int, int]:
    """`window` and `overlap` with the defaults of `load`, checked against the model's context (None: unbounded)."""
    if window is None:
        window = min(context or MAX_DEFAULT_WINDOW, MAX_DEFAULT_WINDOW)
    if context is not None and window > context:
        raise ValueError(f"window {window} is longer than the model's context of {context} tokens")
    size = window - (bos is not None)
    if size < 2:
        raise ValueError(f"window {window} is too short to score a token in context")
    if overlap is None:
        overlap = max(1, size // 4)
    windows(0, size, overlap)  # raises where they do not fit
    return window, overlap


def check_window(
    model: str, window: int, overlap: int | None, bos: int | None, *, trust_remote_code: bool = False
) -> None:
    """Raise ModelError, before any model is loaded, where the model's context is too short for the window."""
    config = text_config(model, trust_remote_code=trust_remote_code)
    try:
        settle_window(getattr(config, "max_position_embeddings", None), window, overlap, bos)
    except ValueError as error:
        raise ModelError(str(error)) from None


def spare_window(model: str, *, trust_remote_code: bool = False) -> int:
    """The default window of a scorer that must generate a token: the context less one, at most 2048 tokens."""
    config = text_config(model, trust_remote_code=trust_remote_code)
    context = getattr(config, "max_position_embeddings", None) or MAX_DEFAULT_WINDOW + 1
    return min(context - 1, MAX_DEFAULT_WINDOW)


def finish(nll: list[np.ndarray], correct: list[np.ndarray] | None, faults: list[str | None]) -> list[Scores]:
    """Filled arrays to `Scores`; a document without a fault whose scores are not all finite gets one."""
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
