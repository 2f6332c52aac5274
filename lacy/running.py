"""How every command runs: quietly, and with errors of one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from lacy.schemas.errors import LacyError, UsageError

FAILED, INTERRUPTED = LacyError.exit_code, 130
debug = False  # --debug was given


def quiet(threads: int | None) -> None:
    """Set before the libraries are imported; workers inherit it. None: as many threads as the libraries like."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        if threads is not None:
            os.environ.setdefault(name, str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads and threads > 1 else "false")
    if not debug:
        import logging
        import warnings

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)


@contextmanager
def known_errors() -> Iterator[None]:
    """A known error is one line; any other too, unless --debug."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as stopped:
        _end(str(stopped) or "stopped; run the same command to go on", INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        _end(*_told(error))


def _told(error: Exception) -> tuple[str, int]:
    """The line for the user, and the exit code."""
    from pydantic import ValidationError

    if isinstance(error, LacyError):
        return first_line(error), error.exit_code
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        return flag + first["msg"].removeprefix("Value error, "), UsageError.exit_code
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, FAILED
    return f"{type(error).__name__}: {first_line(error)}", FAILED


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _end(message: str, code: int) -> NoReturn:
    print(f"lacy: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a broken run may leave threads of Beam behind that would keep the process alive
