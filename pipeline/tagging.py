"""The grammar step of the labelling graph. It imports spaCy only where it runs, and never torch."""

import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import apache_beam as beam
import numpy as np

from lacy.labelers import align
from lacy.pipeline.element import Part


@cache
def load_grammar(name: str) -> Any:
    """The spaCy pipeline, once per process. Raises GrammarError."""
    from lacy.labelers import grammar

    return grammar.load_pipeline(name)


class Tag(beam.DoFn):
    """Adds `factual`, `pos` and `ent_type`."""

    def __init__(self, spacy: str, rule: dict[str, bool], alignment: str):
        self._spacy, self._rule, self._alignment = spacy, rule, alignment

    def setup(self) -> None:
        load_grammar(self._spacy)

    def process(self, part: Part) -> Iterator[Part]:
        from lacy.labelers import grammar

        started = time.monotonic()
        texts, tokens = part.texts(), part.tokens()
        words = grammar.tag(load_grammar(self._spacy), texts, **self._rule)
        word = align.token_words(tokens, texts, words.doc, words.start, words.end, policy=self._alignment)
        word = np.where(word < 0, len(words.doc), word)  # a token without a word gets the 0 behind the last one
        signals = {name: np.append(getattr(words, name), 0)[word] for name in ("factual", "pos", "ent_type")}
        tagged = part.with_columns(
            factual=tokens.lists(signals["factual"].astype(bool)),
            pos=tokens.lists(signals["pos"].astype(np.uint8)),
            ent_type=tokens.lists(signals["ent_type"].astype(np.uint8)),
        )
        yield tagged.timed("grammar", time.monotonic() - started)
