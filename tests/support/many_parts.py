"""A dataset of very many tiny parts, written in the time that the files take: each is a copy with ids of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lacy.schemas.files import sha256
from lacy.schemas.manifest import (
    CorpusFile,
    LabelSet,
    Manifest,
    deadletter_path,
    labels_path,
    load,
    record_path,
    save,
    signals_path,
)
from lacy.schemas.parts import to_parquet

PART_BYTES = 1024
BAD_EVERY = 50  # parts, of which the last has a dead letter
PLACE = "part-number"  # stands in a copy where its number belongs


def label(corpus: Path, out: Path, model: Path) -> list[object]:
    """The command that writes a dataset of such parts."""
    return ["label", corpus, "--out", out, "--reference", model, "--part-bytes", PART_BYTES, "--workers", 1]


def multiply(base: Path, out: Path, count: int, *, running: bool = False) -> Path:
    """Write a dataset of `count` parts like the first of `base`, which `label(...)` wrote, and return its corpus.

    The command that wrote `base` knows the dataset as its own, with that corpus. running: as an interrupted run leaves
    it, with all parts measured.
    """
    shutil.copytree(base / "tokenizer", out / "tokenizer")
    for folder in ("signals", "labels/lacy", "deadletter", ".parts"):
        (out / folder).mkdir(parents=True)
    manifest, labels = load(base / "manifest.json", Manifest), load(base / "labels/lacy/_policy.json", LabelSet)
    first, entry = manifest.parts[0], labels.parts[0]
    corpus = out.with_suffix(".jsonl")
    with corpus.open("wb") as file:
        file.truncate(count * PART_BYTES)  # a hole, which nobody reads
    signals = _template(signals_path(base, first.name))
    decided = _template(labels_path(base, "lacy", first.name))
    records, entries = [], []
    for number in range(count):
        name = f"part-00000-{number * PART_BYTES:015d}"
        one, other = _copy(signals, number), _copy(decided, number)
        signals_path(out, name).write_bytes(one)
        letters = b""
        if number % BAD_EVERY == BAD_EVERY - 1:
            letters = json.dumps({"source": str(corpus), "position": number, "reason": "none", "doc_id": ""}).encode()
            deadletter_path(out, name).write_bytes(letters)
        update = {"name": name, "bytes": len(one), "sha256": sha256(one), "bad": int(bool(letters))}
        record = first.model_copy(update=update | {"deadletter_sha256": sha256(letters) if letters else ""})
        records.append(record)
        if running:
            record_path(out, name).write_text(record.model_dump_json(indent=1))
        else:
            labels_path(out, "lacy", name).write_bytes(other)
            update = {"name": name, "bytes": len(other), "sha256": sha256(other)}
            entries.append(entry.model_copy(update=update))
    totals: dict[str, Any] = {"corpus": [CorpusFile(path=str(corpus), bytes=count * PART_BYTES)], "state": "running"}
    if not running:
        totals |= {"state": "complete", "parts": records, "bad": sum(record.bad for record in records)}
        totals |= {"documents": count * first.rows, "tokens": count * first.tokens, "factual": count * first.factual}
        chosen, tokens = count * (entry.delegated + entry.ignored), count * first.tokens
        sums = {"candidates": count * entry.candidates, "tokens": tokens, "chosen": chosen, "share": chosen / tokens}
        save(out / "labels/lacy/_policy.json", labels.model_copy(update=sums | {"parts": entries}))
    save(out / "manifest.json", manifest.model_copy(update=totals))
    return corpus


def _template(path: Path) -> bytes:
    table = pq.ParquetFile(path).read()
    ids = pa.array([f"{PLACE}-{row}" for row in range(table.num_rows)])
    data = to_parquet(table.set_column(0, table.schema.field("doc_id"), ids)).to_pybytes()
    made = pq.ParquetFile(pa.BufferReader(_copy(data, 7))).read()["doc_id"].to_pylist()
    assert made == [f"{7:0{len(PLACE)}d}-{row}" for row in range(table.num_rows)], (
        "the ids are not stored as they stand"
    )
    return data


def _copy(template: bytes, number: int) -> bytes:
    return template.replace(PLACE.encode(), b"%0*d" % (len(PLACE), number))
