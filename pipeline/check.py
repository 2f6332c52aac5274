"""`lacy check`: every part of a dataset against its manifest, and the invariants that hold for every document."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labelers import tokenize
from schemas import codes
from schemas.files import sha256_of
from schemas.manifest import (
    DatasetError,
    LabelSet,
    Manifest,
    PartRecord,
    deadletter_path,
    label_sets,
    labels_path,
    read_complete,
    signals_path,
)
from schemas.parts import LABELS, SIGNALS, TOKEN_COLUMNS, select


def check(dataset: Path, on_part: Callable[[int, int], None] | None = None) -> Iterator[str]:
    """One line for each fault; none when the dataset is sound. `on_part` is told (parts done, parts in all).

    Raises DatasetError when there is no finished dataset.
    """
    manifest = read_complete(dataset)
    sets = label_sets(dataset)
    tokenizer = tokenize.load(str(dataset / "tokenizer"))
    if tokenizer.sha256 != manifest.tokenizer["sha256"]:
        yield f"tokenizer/ is not the tokenizer of the manifest ({manifest.tokenizer['name']})"
    yield from _totals(dataset, manifest, sets)
    for done, record in enumerate(manifest.parts):
        if on_part:
            on_part(done, len(manifest.parts))
        yield from _part(dataset, manifest, record, sets, tokenizer)


def _totals(dataset: Path, manifest: Manifest, sets: dict[str, LabelSet]) -> Iterator[str]:
    for total, field in (("documents", "rows"), ("tokens", "tokens"), ("factual", "factual"), ("bad", "bad")):
        summed = sum(getattr(record, field) for record in manifest.parts)
        if summed != getattr(manifest, total):
            yield f"manifest.json: {total} is {getattr(manifest, total):,}, its parts add up to {summed:,}"
    named = {record.name for record in manifest.parts if record.rows}
    for folder in [dataset / "signals", *(dataset / "labels" / name for name in sets)]:
        for path in sorted(folder.glob("*.parquet")):
            if path.stem not in named:
                yield f"{path.relative_to(dataset)}: not in the manifest"
    for name, labels in sets.items():
        missing = named - {record.name for record in labels.parts}
        if missing:
            yield f"labels/{name}: {len(missing)} parts have no labels: run lacy decide again"
        if labels.tokens != manifest.tokens:
            yield f"labels/{name}: {labels.tokens:,} tokens, the signals have {manifest.tokens:,}"


def _part(
    dataset: Path,
    manifest: Manifest,
    record: PartRecord,
    sets: dict[str, LabelSet],
    tokenizer: tokenize.TargetTokenizer,
) -> Iterator[str]:
    letters = deadletter_path(dataset, record.name)
    if record.bad and not letters.exists():
        yield f"deadletter/{letters.name}: missing, though the part has {record.bad} bad records"
    elif record.bad and sha256_of(letters) != record.deadletter_sha256:
        yield f"deadletter/{letters.name}: checksum differs from the manifest"
    if not record.rows:
        return
    path = signals_path(dataset, record.name)
    try:
        table = _read(path, record.sha256, SIGNALS)
    except DatasetError as error:
        yield f"signals/{path.name}: {error}"
        return
    for fault in _signals(table, record, tokenizer):
        yield f"signals/{path.name}: {fault}"
    for name, labels in sets.items():
        entry = next((entry for entry in labels.parts if entry.name == record.name), None)
        if entry is None:
            continue
        try:
            decided = _read(labels_path(dataset, name, record.name), entry.sha256, LABELS)
        except DatasetError as error:
            yield f"labels/{name}/{path.name}: {error}"
            continue
        for fault in _labels(decided, table, entry.delegated, entry.ignored):
            yield f"labels/{name}/{path.name}: {fault}"


def _read(path: Path, digest: str, schema: pa.Schema) -> pa.Table:
    if not path.exists():
        raise DatasetError("missing")
    if sha256_of(path) != digest:
        raise DatasetError("checksum differs from the manifest")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"cannot be read: {str(error).splitlines()[0]}") from None
    if not table.schema.equals(select(schema, table.schema.names)):
        raise DatasetError("columns are not those of the schema")
    return table


def _signals(table: pa.Table, record: PartRecord, tokenizer: tokenize.TargetTokenizer) -> Iterator[str]:
    columns = {name: table[name].combine_chunks() for name in table.schema.names}
    lists = [name for name in TOKEN_COLUMNS if name in columns]
    offsets = columns["token_ids"].offsets.to_numpy()
    counts = (table.num_rows, int(offsets[-1]))
    if counts != (record.rows, record.tokens):
        yield f"{counts[0]} documents and {counts[1]} tokens, the manifest says {record.rows} and {record.tokens}"
    uneven = [name for name in lists if not np.array_equal(columns[name].offsets.to_numpy(), offsets)]
    if uneven:
        yield f"lists of unequal length: {', '.join(uneven)}"
        return
    if len(columns["doc_id"].unique()) != table.num_rows:
        yield "a doc_id occurs twice"
    ids = columns["token_ids"].values.to_numpy()
    starts, ends = (columns[name].values.to_numpy() for name in ("token_starts", "token_ends"))
    if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        yield "a token id is beyond the vocabulary"
    if (ids == tokenizer.call_id).any():
        yield f"{tokenize.CALL} stands among the tokens"
    first = np.zeros(len(ids), bool)
    first[offsets[:-1][np.diff(offsets) > 0]] = True
    if (starts > ends).any() or (starts[1:] < starts[:-1])[~first[1:]].any() or (starts[first] < 0).any():
        yield "token offsets do not rise"
    for name, table_of_codes in (("pos", codes.POS), ("ent_type", codes.ENT_TYPES)):
        if len(ids) and columns[name].values.to_numpy().max() >= len(table_of_codes):
            yield f"{name} has a code that schemas.codes does not know"
    for name in ("ref_nll", "student_nll"):
        if name not in columns:
            continue
        values = columns[name].values.to_numpy(zero_copy_only=False)
        if not np.isnan(values[first]).all():
            yield f"{name}: the first token of a document has a score"
        if np.isinf(values).any() or (values < 0).any():
            yield f"{name}: a score is negative or infinite"
    if "judge" in columns:
        values = columns["judge"].values.to_numpy(zero_copy_only=False)
        if ((values < 0) | (values > 1)).any():
            yield "judge: a score is not between 0 and 1"
    if "text" in columns:
        lengths = np.array([len(text) for text in columns["text"].to_pylist()])
        last = offsets[1:][np.diff(offsets) > 0] - 1
        if (ends[last] > lengths[np.diff(offsets) > 0]).any():
            yield "a token ends behind its text"


def _labels(decided: pa.Table, signals: pa.Table, delegated: int, ignored: int) -> Iterator[str]:
    for name in ("doc_id", "token_ids", "factual", "ref_nll", "student_nll", "judge"):
        if name in decided.schema.names and not decided[name].equals(signals[name]):
            yield f"{name} differs from the signals"
    column = decided["label"].combine_chunks()
    label, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    counts = np.bincount(label, minlength=3)
    if len(counts) > 3:
        yield "an unknown label code"
    elif (counts[codes.DELEGATE], counts[codes.IGNORE]) != (delegated, ignored):
        yield "counts of labels differ from policy.json"
    if (label[offsets[:-1][np.diff(offsets) > 0]] != codes.LEARN).any():
        yield "the first token of a document is not to be learnt"
