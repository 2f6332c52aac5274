"""LaCy: which tokens a small language model should learn, and which it should delegate to a larger one."""

from importlib.metadata import version
from typing import Any


def __getattr__(name: str) -> str:
    if name == "__version__":
        return version("lacy")
    raise AttributeError(f"module 'lacy' has no attribute {name!r}")


def connect(dataset: Any) -> Any:
    """A DuckDB connection with the views of a dataset, a folder or a URL: documents, tokens, labels, parts.

    It reads the files of the dataset and can open nothing else (see lacy.stats.connect, and docs/queries.md).
    """
    from lacy.stats.connect import connect as _connect

    return _connect(dataset)
