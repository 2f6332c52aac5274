"""LaCy: which tokens a small language model should learn, and which it should delegate to a larger one."""

from importlib.metadata import version
from typing import Any

__version__ = version("lacy")


def connect(dataset: Any) -> Any:
    """A DuckDB connection with the views of a dataset: documents, tokens, labels, parts (see stats.connect)."""
    from stats.connect import connect as _connect

    return _connect(dataset)
