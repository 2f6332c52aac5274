"""Fold the records of finished parts into the manifest, once all parts are measured, and find parts lost since."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lacy.pipeline.corpus.deadletters import Code, DeadLetter, dead_letter, fault, position_of
from lacy.pipeline.corpus.sources import SPOOL
from lacy.pipeline.duplicates import duplicates
from lacy.pipeline.write import write_part
from lacy.schemas.card import write_card
from lacy.schemas.errors import CorpusError, RunError
from lacy.schemas.files import folders, read_bytes, read_many, remove, remove_tree, sizes
from lacy.schemas.manifest import (
    OLD_POLICY,
    POLICY,
    RECORDS,
    Manifest,
    PartRecord,
    deadletter_path,
    parse,
    read_manifest,
    save,
    signals_path,
)


def finished_parts(dataset: Path) -> list[PartRecord]:
    """The records of parts whose file is there in full size. Other records are removed: their parts are unfinished."""
    paths = [dataset / RECORDS / name for name in sizes(dataset / RECORDS, "part-*.json")]
    written = sizes(dataset / "signals", "part-*.parquet") if paths else {}
    try:
        data = read_many(paths)
    except FileNotFoundError:  # another run has folded them and removes them: only a store lets two runs at once
        return finished_parts(dataset)
    finished = []
    for path, content in zip(paths, data, strict=True):
        record = parse(path, content, PartRecord)
        if written.get(f"{record.name}.parquet", 0) == record.bytes:
            finished.append(record)
        else:
            remove(path)
    return finished


def lost_parts(dataset: Path, manifest: Manifest) -> list[PartRecord]:
    """The parts of a complete dataset whose signals or dead letters are missing, or whose signals changed in size."""
    signals = sizes(dataset / "signals", "part-*.parquet")
    letters = sizes(dataset / "deadletter", "part-*.jsonl") if manifest.bad else {}
    return [
        record
        for record in manifest.parts
        if (record.rows and signals.get(f"{record.name}.parquet") != record.bytes)
        or (record.bad and f"{record.name}.jsonl" not in letters)
    ]


def fold(dataset: Path, max_bad: float) -> Manifest:
    """Write the manifest of a dataset whose parts are all measured.

    Another run may have done so while this one measured some parts again: its records are folded once more.
    """
    fresh = finished_parts(dataset)
    manifest = read_manifest(dataset)  # after the records, which are removed when they are in the manifest
    by_name = {record.name: record for record in [*manifest.parts, *fresh]}
    _drop_duplicates(dataset, by_name)
    if any(record.sha256 != by_name[record.name].sha256 for record in manifest.parts):
        _forget_labels(dataset)
    records = [by_name[name] for name in sorted(by_name)]
    if not any(record.rows for record in records):
        bad = sum(record.bad for record in records)
        why = f"{bad:,} bad records, see {dataset / 'deadletter'}" if bad else "the corpus is empty"
        remove_tree(dataset / SPOOL)
        raise CorpusError(f"no document to label: {why}")
    judged: Counter[str] = Counter()
    for record in records:
        judged.update(record.judged)
    complete = manifest.model_copy(
        update={
            "state": "complete",
            "documents": sum(record.rows for record in records),
            "tokens": sum(record.tokens for record in records),
            "factual": sum(record.factual for record in records),
            "bad": sum(record.bad for record in records),
            "skipped": sum(record.skipped for record in records),
            "judged": dict(judged),
            "parts": records,
        }
    )
    total = complete.bad + complete.documents
    if complete.bad / total > max_bad:
        raise RunError(
            f"{complete.bad:,} of {total:,} records are bad, more than --max-bad {max_bad:g}: "
            f"see {dataset / 'deadletter'}, then rerun with a higher --max-bad"
        )
    save(dataset / "manifest.json", complete)
    write_card(dataset, complete)
    clear(dataset)
    return complete


def _forget_labels(dataset: Path) -> None:
    """Remove the records of all label sets, since a part that was measured again has other bytes than before."""
    for name in folders(dataset / "labels"):
        for record in (POLICY, OLD_POLICY):
            remove(dataset / "labels" / name / record)


def clear(dataset: Path) -> None:
    """Remove what only a run needs."""
    for name in (RECORDS, SPOOL):
        remove_tree(dataset / name)


def _drop_duplicates(dataset: Path, records: dict[str, PartRecord]) -> None:
    """Where documents of several parts share an id, keep the first in corpus order; the others become dead letters.

    Duplicates within a part are dropped when it is read. Rewrites the affected parts and their entries in `records`.
    """
    parts = {name: records[name].bytes for name in sorted(records) if records[name].rows}
    for name, rows in duplicates(dataset, parts).items():
        record = records[name]
        table = pq.read_table(pa.BufferReader(read_bytes(signals_path(dataset, name))))
        lines = read_bytes(deadletter_path(dataset, name)).splitlines() if record.bad else []
        bad = [DeadLetter(**json.loads(line)) for line in lines]
        for row in rows:
            position = position_of(table["source"][row].as_py())
            bad.append(dead_letter(record.source, position, fault(Code.DUPLICATE), table["doc_id"][row].as_py()))
        kept = table.take(np.setdiff1d(np.arange(table.num_rows), rows))
        if kept.num_rows == 0:
            remove(signals_path(dataset, name))
        facts = record.model_dump(include={"skipped", "scored", "judged"})
        records[name] = write_part(dataset, name, record.source, kept, tuple(bad), **facts)
