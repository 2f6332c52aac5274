"""How every command runs: quietly, and with errors of one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from lacy.schemas.errors import LacyError, UsageError

FAILED, INTERRUPTED = LacyError.exit_code, 130
EXTRAS = {"vllm": "vllm", "s3fs": "s3", "gcsfs": "gcs"}  # packages that a command needs for some options alone
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
debug = False  # --debug was given


def quiet(threads: int | None) -> None:
    """Silence the libraries and limit their threads, before they are imported; worker processes inherit both.

    threads  None: as many as the libraries choose
    """
    for name in THREADS:
        if threads is not None:
            os.environ.setdefault(name, str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads and threads > 1 else "false")
    if not debug:
        import logging
        import warnings

        hush_libraries()
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)


def hush_libraries() -> None:
    """Keep the libraries that are imported from here on from printing; a setting of the user's own stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextmanager
def known_errors(command: str = "", extra: str = "") -> Iterator[None]:
    """Print an error as one line and exit with its code; with --debug raise what is not a known error.

    command, extra  name of the command, and the extra of the package that it needs
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as stopped:
        _end(str(stopped) or "stopped; rerun the same command to resume", INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        _end(*_line(error, command, extra))


def as_known(error: Exception, command: str = "", extra: str = "") -> LacyError | None:
    """The LacyError that another library's error amounts to; None for an error that is not known."""
    from pydantic import ValidationError

    if isinstance(error, LacyError):
        return error
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        return UsageError(flag + first["msg"].removeprefix("Value error, "))
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package and package != "lacy" and (extra or package in EXTRAS):
        extra = EXTRAS.get(package, extra)
        what = command or "this"
        return LacyError(f"{what} needs packages that are not installed ({package}): pip install 'lacy[{extra}]'")
    if isinstance(error, OSError) and error.strerror:
        return LacyError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return None


def _line(error: Exception, command: str, extra: str) -> tuple[str, int]:
    """The line for the user, and the exit code."""
    if known := as_known(error, f"lacy {command}", extra):
        return first_line(known), known.exit_code
    return f"{type(error).__name__}: {first_line(error)}", FAILED


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _end(message: str, code: int) -> NoReturn:
    print(f"lacy: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a broken run may leave threads of Beam behind that would keep the process alive
