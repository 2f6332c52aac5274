"""A small finished dataset, labelled by the real command."""

from pathlib import Path

import pytest

from tests.support import corpora, many_parts


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, small_model, labeller) -> Path:
    """Some parts with a few documents each, and the label set lacy. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("tiny")
    corpus = corpora.write(folder / "c.jsonl", corpora.documents(12, seed=1, sentences=3))
    done = labeller(*many_parts.label(corpus, folder / "d", small_model))
    assert done.returncode == 0, done.stderr
    return folder / "d"
