"""Write a finished part: its signals, its dead letters and, last, its record."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from lacy.pipeline.corpus.deadletters import DeadLetter
from lacy.schemas.errors import DatasetError
from lacy.schemas.files import read_bytes, sha256, write_atomic
from lacy.schemas.manifest import RECORDS, PartRecord, deadletter_path, read_manifest, record_path, save, signals_path
from lacy.schemas.parts import SIGNALS, select, to_parquet


def write_part(
    dataset: Path,
    name: str,
    source: str,
    table: pa.Table,
    bad: tuple[DeadLetter, ...],
    **facts: Any,
) -> PartRecord:
    """Write the files of a part and, last, its record; `facts` are the fields of the record that the table does not
    determine. Writing the same part again gives the same bytes.
    """
    data: memoryview | bytes = b""
    if table.num_rows:
        schema = select(SIGNALS, table.schema.names)
        data = memoryview(to_parquet(table.select(schema.names).cast(schema)))
        write_atomic(signals_path(dataset, name), data)
    letters = b"".join(json.dumps(asdict(letter), ensure_ascii=False).encode() + b"\n" for letter in bad)
    if letters:
        write_atomic(deadletter_path(dataset, name), letters)
    record = PartRecord(
        name=name,
        source=source,
        rows=table.num_rows,
        tokens=len(table.column("token_ids").combine_chunks().flatten()),
        factual=table.column("factual").combine_chunks().flatten().true_count if table.num_rows else 0,
        bad=len(bad),
        bytes=len(data),
        sha256=sha256(data),
        deadletter_sha256=sha256(letters) if letters else "",
        **facts,
    )
    save(record_path(dataset, name), record)
    return record


class RunOverError(DatasetError):
    """The run of this worker has ended."""


def admit(dataset: Path, run: str) -> None:
    """Let the workers of a run write to a dataset, until its records are folded into the manifest or it is removed.

    A killed launcher leaves workers on other machines behind. They would go on writing for hours, perhaps into another
    dataset of the same name.
    """
    write_atomic(_admission(dataset, run), b"")


def require_admission(dataset: Path, run: str) -> None:
    """Raises RunOverError when the run may no longer write."""
    try:
        read_bytes(_admission(dataset, run))
    except FileNotFoundError:
        raise RunOverError(f"{dataset} was finished or removed while this run was going on") from None


def _admission(dataset: Path, run: str) -> Path:
    return dataset / RECORDS / f"run-{run[:16]}"


def has_record(dataset: Path, name: str) -> bool:
    """Whether a part is finished, by another run of the same command or by a worker that was presumed lost."""
    try:
        return bool(read_bytes(record_path(dataset, name)))
    except FileNotFoundError:
        return False


def is_finished(dataset: Path, name: str) -> bool:
    """Whether a part has its record, or the whole dataset is finished."""
    return has_record(dataset, name) or read_manifest(dataset).state == "complete"
