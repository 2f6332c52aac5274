"""Texts to continue: from the command line, a file or standard input."""

import json
import sys
from pathlib import Path

from lacy.schemas.errors import UsageError


def read_lines(file: Path) -> list[str]:
    """Raises UsageError for a file that cannot be read."""
    try:
        return file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The given prompts, those of a file (JSONL with "prompt", else one per line), or standard input as one prompt.

    Raises UsageError where there is none.
    """
    if given and file:
        raise UsageError("prompts come from --prompt or from --prompts, not from both")
    if file is not None:
        given = [line for line in read_lines(file) if line.strip()]
        if file.suffix == ".jsonl":
            try:
                given = [str(json.loads(line)["prompt"]) for line in given]
            except (ValueError, LookupError, TypeError):
                raise UsageError(f'{file} does not have one JSON object with "prompt" per line') from None
    elif not given:
        if sys.stdin.isatty():
            raise UsageError("nothing to continue: pass --prompt TEXT or --prompts FILE")
        given = [text] if (text := sys.stdin.read().rstrip("\n")) else []
    if not given:
        raise UsageError("nothing to continue: there is no prompt in the input")
    return given
