"""LaCy: which tokens a small language model should learn, and which it should delegate to a larger one."""

from importlib.metadata import version
from typing import Any

__version__ = version("lacy")


def connect(dataset: Any) -> Any:
    """A DuckDB connection with the views of a dataset, a folder or a URL: documents, tokens, labels, parts.

    It reads the files of the dataset and can open nothing else (see stats.connect, and docs/queries.md).
    """
    from stats.connect import connect as _connect

    return _connect(dataset)
