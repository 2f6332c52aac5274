"""Results of evaluations on disk: figures, and the units that they are computed from, for intervals.

RUN/eval/step-00001000/
  delegation.json      `Result`
  delegation.parquet   its units: one row per token, prompt, entity or question
"""

import io
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from lacy.schemas.errors import CascadeError
from lacy.schemas.files import write_atomic


class Result(BaseModel):
    """The result of an evaluation.

    kind        delegation, leakage, containment, factscore or nlu
    checkpoint  name of the checkpoint's folder
    options     everything that the figures depend on, except the checkpoint
    figures     the numbers, by name; None if there is nothing to count
    details     material to look at: curves, examples, the text of answers
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    kind: str
    checkpoint: str
    options: dict[str, Any]
    figures: dict[str, float | None]
    details: dict[str, Any] = {}


def save(folder: Path, result: Result, units: pa.Table) -> None:
    """Write a result; the JSON last, so that a result with JSON has its units."""
    buffer = io.BytesIO()
    pq.write_table(units, buffer, compression="zstd")
    write_atomic(folder / f"{result.kind}.parquet", buffer.getvalue())
    write_atomic(folder / f"{result.kind}.json", (result.model_dump_json(indent=1) + "\n").encode())


def read(folder: Path, kind: str) -> tuple[Result, pa.Table] | None:
    """A result and its units; None if there is none. Raises CascadeError if it is damaged."""
    path = folder / f"{kind}.json"
    command = "leakage" if kind == "containment" else kind
    try:
        return Result.model_validate_json(path.read_bytes()), pq.read_table(path.with_suffix(".parquet"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, pa.ArrowException):
        raise CascadeError(f"{path} cannot be read: write it again with lacy eval {command}") from None
