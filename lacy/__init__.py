"""LaCy: which tokens a small language model should learn, and which it should delegate to a larger one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lacy.api import decide, generate, label, train
    from lacy.schemas.errors import LacyError
    from lacy.stats.connect import connect

    __version__: str

__all__ = ["LacyError", "__version__", "connect", "decide", "generate", "label", "train"]

_HOMES = {
    "connect": "lacy.stats.connect",
    "decide": "lacy.api",
    "generate": "lacy.api",
    "label": "lacy.api",
    "train": "lacy.api",
    "LacyError": "lacy.schemas.errors",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that `import lacy` is light."""
    if name == "__version__":
        from importlib.metadata import version

        return version("lacy")
    if name in _HOMES:
        from importlib import import_module

        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module 'lacy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
