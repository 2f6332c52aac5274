"""Language models as RunInference handlers over whole parts: scorers and the judge.

Imported only where a run has a model: RunInference imports torch.
"""

import importlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from apache_beam.ml.inference.base import ModelHandler

from lacy.labelers import align, tokenize
from lacy.labelers.llm.engines import EngineChat, Engines, EngineScorer, EngineSpec, run_folder
from lacy.pipeline.corpus.deadletters import Code, fault
from lacy.pipeline.element import Part
from lacy.pipeline.options import ModelSpec
from lacy.pipeline.runners.heartbeat import Heartbeat


class _PartHandler(ModelHandler[Part, Part, Any]):
    """A part is a batch already: Beam neither batches it nor pickles it to know its size."""

    def should_skip_batching(self) -> bool:
        return True

    def get_num_bytes(self, batch: Sequence[Part]) -> int:
        return batch.batch.nbytes  # type: ignore[attr-defined]


@dataclass
class _Loaded:
    """A class, because Beam shares models by weak reference."""

    model: Any
    engines: Engines | None
    tokenizer: tokenize.TargetTokenizer | None

    def clock(self) -> float:
        """Seconds of work: of the engines, which other workers use too, or else of this process."""
        return self.engines.seconds if self.engines else time.monotonic()


def _load(spec: ModelSpec, on_engine: Any, heartbeat: Heartbeat) -> _Loaded:
    """The model of a spec: in this process, or on engines that the workers of a machine share."""
    tokenizer = tokenize.load(spec.tokenizer) if spec.tokenizer else None
    if not spec.engines:
        module, _, name = spec.factory.partition(":")
        return _Loaded(getattr(importlib.import_module(module), name)(**spec.arguments), None, tokenizer)
    engines = Engines(
        EngineSpec(spec.role, spec.factory, spec.arguments, spec.engines, spec.gpus),
        run_folder(heartbeat.run),
        heartbeat.launcher,
        heartbeat.restarted,
    )
    return _Loaded(on_engine(engines), engines, tokenizer)


class ScoreHandler(_PartHandler):
    """Adds `column`, the negative log-likelihood of each token, and `correct_column` where the scorer can tell."""

    def __init__(self, spec: ModelSpec, column: str, correct_column: str | None, heartbeat: Heartbeat):
        self._spec, self._column, self._correct, self._heartbeat = spec, column, correct_column, heartbeat

    def load_model(self) -> _Loaded:
        return _load(self._spec, EngineScorer, self._heartbeat)

    def run_inference(
        self, batch: Sequence[Part], model: _Loaded, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Part]:
        part: Part = batch  # type: ignore[assignment]
        started = model.clock()
        target = part.tokens()
        source = tokenize.encode(model.tokenizer, part.texts()) if model.tokenizer else target
        documents = np.split(source.ids, source.offsets[1:-1]) if len(part) else []
        scores = model.model.score(documents, on_tokens=self._heartbeat.scored)
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
        faults = {
            row: fault(Code.KILLS_ENGINE if score.fatal else Code.NOT_SCORED, score.error)
            for row, score in enumerate(scores)
            if score.error
        }
        scored = replace(part, scored=part.scored | {self._spec.role: model.model.path}).with_columns(**columns)
        return [scored.without(faults).timed(self._spec.role, model.clock() - started)]


class JudgeHandler(_PartHandler):
    """Adds `judge`: how strongly an LLM marks each token as one that a small model cannot infer."""

    def __init__(self, spec: ModelSpec, heartbeat: Heartbeat):
        self._spec, self._heartbeat = spec, heartbeat

    def load_model(self) -> _Loaded:
        return _load(self._spec, EngineChat, self._heartbeat)

    def run_inference(
        self, batch: Sequence[Part], model: _Loaded, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Part]:
        part: Part = batch  # type: ignore[assignment]
        from lacy.labelers import judge

        started = model.clock()
        texts, tokens = part.texts(), part.tokens()
        verdicts = judge.judge(model.model, texts)
        signal = judge.token_scores(verdicts, tokens, texts)
        judged = replace(part, judged=verdicts.counts()).with_columns(
            judge=tokens.lists(pa.array(signal, from_pandas=True))
        )
        return [judged.timed("judge", model.clock() - started)]


def _flat(arrays: Sequence[np.ndarray | None], lengths: Sequence[int], missing: Any, dtype: type) -> np.ndarray:
    """The arrays concatenated; a document without one gets `missing` for each token."""
    whole = [
        np.full(length, missing, dtype) if array is None or len(array) != length else array
        for array, length in zip(arrays, lengths, strict=True)
    ]
    return np.concatenate(whole or [np.zeros(0)]).astype(dtype)
