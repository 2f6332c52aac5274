"""The grammar step of the labelling graph. It imports spaCy only where it runs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import apache_beam as beam
import numpy as np

from lacy.labelers import align
from lacy.pipeline.element import Part


@cache
def load_grammar(name: str, without_torch: bool = False) -> Any:
    """The spaCy pipeline, once per process. Raises GrammarError.

    without_torch: for a pipeline that does not need it, in a process that does not either
    """
    with _hidden("torch" if without_torch else ""):
        from lacy.labelers import grammar

        return grammar.load_pipeline(name)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Hide a package from imports: thinc imports torch where it can, which takes seconds and half a gigabyte."""
    if not package or package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


class Tag(beam.DoFn):
    """Adds `factual`, `pos` and `ent_type`."""

    def __init__(self, spacy: str, rule: dict[str, bool], alignment: str, without_torch: bool):
        self._spacy, self._rule, self._alignment, self._without_torch = spacy, rule, alignment, without_torch

    def setup(self) -> None:
        self._nlp = load_grammar(self._spacy, self._without_torch)

    def process(self, part: Part) -> Iterator[Part]:
        from lacy.labelers import grammar

        started = time.monotonic()
        texts, tokens = part.texts(), part.tokens()
        words = grammar.tag(self._nlp, texts, **self._rule)
        word = align.token_words(tokens, texts, words.doc, words.start, words.end, policy=self._alignment)
        word = np.where(word < 0, len(words.doc), word)  # a token without a word gets the 0 behind the last one
        signals = {name: np.append(getattr(words, name), 0)[word] for name in ("factual", "pos", "ent_type")}
        tagged = part.with_columns(
            factual=tokens.lists(signals["factual"].astype(bool)),
            pos=tokens.lists(signals["pos"].astype(np.uint8)),
            ent_type=tokens.lists(signals["ent_type"].astype(np.uint8)),
        )
        yield tagged.timed("grammar", time.monotonic() - started)
