"""The two models of the labelling graph, as RunInference handlers over whole parts: grammar and reference LLM."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from apache_beam.ml.inference.base import ModelHandler

from labelers import align, reference, tokenize
from pipeline.element import Part
from pipeline.heartbeat import Heartbeat
from pipeline.options import ScorerSpec


class _PartHandler(ModelHandler[Part, Part, Any]):
    """A part is a batch already: no batching by Beam, and its size is not found by pickling it."""

    def should_skip_batching(self) -> bool:
        return True

    def get_num_bytes(self, batch: Sequence[Part]) -> int:
        return batch.batch.nbytes  # type: ignore[attr-defined]


class GrammarHandler(_PartHandler):
    """Adds `factual`, `pos` and `ent_type`."""

    def __init__(self, spacy: str, rule: dict[str, bool], alignment: str):
        self._spacy, self._rule, self._alignment = spacy, rule, alignment

    def load_model(self) -> Any:
        from labelers import grammar  # spaCy takes seconds to import: only where it is used

        return grammar.load_pipeline(self._spacy)

    def run_inference(
        self, batch: Sequence[Part], model: Any, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Part]:
        part: Part = batch  # type: ignore[assignment]
        from labelers import grammar

        texts, tokens = part.texts(), part.tokens()
        words = grammar.tag(model, texts, **self._rule)
        word = align.token_words(tokens, texts, words.doc, words.start, words.end, policy=self._alignment)
        missing = len(words.doc)  # the place of a row of zeros behind the last word
        word = np.where(word < 0, missing, word)
        signals = {name: np.append(getattr(words, name), 0)[word] for name in ("factual", "pos", "ent_type")}
        return [
            part.with_columns(
                factual=tokens.lists(signals["factual"].astype(bool)),
                pos=tokens.lists(signals["pos"].astype(np.uint8)),
                ent_type=tokens.lists(signals["ent_type"].astype(np.uint8)),
            )
        ]


@dataclass
class _Loaded:
    """Beam shares models by weak reference, so they must be of a class."""

    scorer: reference.Scorer
    tokenizer: tokenize.TargetTokenizer | None


class ScoreHandler(_PartHandler):
    """Adds `<column>`, the negative log-likelihood of each token, and `correct_column` where it is asked for."""

    def __init__(self, spec: ScorerSpec, column: str, correct_column: str | None, heartbeat: Heartbeat):
        self._spec, self._column, self._correct, self._heartbeat = spec, column, correct_column, heartbeat

    def load_model(self) -> _Loaded:
        spec = self._spec
        tokenizer = tokenize.load(spec.tokenizer) if spec.tokenizer else None
        return _Loaded(reference.load(spec.scorer, spec.model, **spec.arguments), tokenizer)

    def run_inference(
        self, batch: Sequence[Part], model: _Loaded, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Part]:
        part: Part = batch  # type: ignore[assignment]
        target = part.tokens()
        source = tokenize.encode(model.tokenizer, part.texts()) if model.tokenizer else target
        documents = np.split(source.ids, source.offsets[1:-1]) if len(part) else []
        scores = model.scorer.score(documents, on_tokens=self._heartbeat.scored)
        lengths = [len(document) for document in documents]
        nll = _flat([score.nll for score in scores], lengths, np.nan, np.float32)
        correct = None
        if self._correct and any(score.correct is not None for score in scores):
            correct = _flat([score.correct for score in scores], lengths, False, bool)
        if model.tokenizer:
            nll = align.spread_loss(source, nll, target)
            correct = None if correct is None else align.spread_flag(source, correct, target)
        columns = {self._column: target.lists(pa.array(nll, from_pandas=True))}
        if self._correct and correct is not None:
            columns[self._correct] = target.lists(correct)
        errors = {row: score.error for row, score in enumerate(scores) if score.error}
        return [part.with_columns(**columns).without(errors)]


def _flat(arrays: Sequence[np.ndarray | None], lengths: Sequence[int], missing: Any, dtype: type) -> np.ndarray:
    """One array after the other; a document without one gets `missing` for each token."""
    whole = [
        np.full(length, missing, dtype) if array is None or len(array) != length else array
        for array, length in zip(arrays, lengths, strict=True)
    ]
    return np.concatenate(whole or [np.zeros(0)]).astype(dtype)
