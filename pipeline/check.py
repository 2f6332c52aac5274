"""`lacy check`: compare every part of a dataset with its manifest, and verify the invariants of every document.

Parts are checked in batches: their files are read together, each once, and joined into one table, so that a dataset of
100,000 small parts is not 100,000 small computations. A batch with a fault is halved until the faulty part is known.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lacy.pipeline.batches import batches, bounds, join, parse
from lacy.schemas import codes
from lacy.schemas.errors import DatasetError
from lacy.schemas.files import read_bytes, read_many, sha256, sizes
from lacy.schemas.manifest import LabelRecord, LabelSet, Manifest, PartRecord
from lacy.schemas.parts import LABELS, SIGNALS, TOKEN_COLUMNS, select

CALL = "<CALL>"
_COLUMNS = "columns are not those of the schema"
RERUN = "rerun the lacy label command that made the dataset"  # repairs signals
DECIDE = "rerun lacy decide with the same --policy, --budget and --name"  # repairs labels


class _Tokenizer(NamedTuple):
    sha256: str
    vocab_size: int
    call_id: int


T = TypeVar("T")


class _File(NamedTuple):
    """A file of a part, as recorded in the manifest or a label set."""

    part: str
    folder: str
    name: str
    sha256: str
    bytes: int | None  # None: not recorded
    bad: int = 0  # dead letters in it

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def repair(self) -> str:
        return DECIDE if self.folder.startswith("labels/") else RERUN


def check(
    dataset: Path,
    manifest: Manifest,
    sets: dict[str, LabelSet],
    *,
    quick: bool = False,
    workers: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """One line for each fault of a finished dataset; none when it is sound. A missing file names the repair.

    Args:
        manifest, sets: the results of `read_complete` and `label_sets`.
        quick: compare names, sizes and totals only, and read no part.
        workers: threads; most of the work releases the interpreter lock.
        on_progress: called with the number of parts done.

    Raises DatasetError when there is no tokenizer, or a store cannot be read.
    """
    tokenizer = _tokenizer(dataset)
    if tokenizer.sha256 != manifest.tokenizer["sha256"]:
        yield f"tokenizer/ is not the tokenizer of the manifest ({manifest.tokenizer['name']})"
    yield from _totals(manifest, sets)
    listed = {folder: sizes(dataset / folder) for folder in ("signals", "deadletter", *(f"labels/{n}" for n in sets))}
    yield from _strays(manifest, listed)
    labels = {name: {entry.name: entry for entry in labels.parts} for name, labels in sets.items()}
    if quick:
        for record in manifest.parts:
            yield from (f"{file}: {fault}" for file in _files(record, labels) if (fault := _size(file, listed)))
        return
    planned = list(batches(manifest.parts))
    pool = ThreadPoolExecutor(workers)
    try:
        done = 0
        look = partial(_batch, dataset, tokenizer, labels, listed)
        for batch, faults in zip(planned, pool.map(look, planned), strict=True):
            yield from faults
            done += len(batch)
            if on_progress:
                on_progress(done)
    finally:
        pool.shutdown(cancel_futures=True)


def _tokenizer(dataset: Path) -> _Tokenizer:
    """Read from the file itself, so that a check needs no tokenizer library."""
    path = dataset / "tokenizer" / "tokenizer.json"
    try:
        data = read_bytes(path)
        spec = json.loads(data)
        vocabulary = spec["model"]["vocab"]  # a dict of ids, or for Unigram a list of tokens with scores
        ids = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        return _Tokenizer(sha256(data), len(ids | set(added.values())), added[CALL])
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _totals(manifest: Manifest, sets: dict[str, LabelSet]) -> Iterator[str]:
    for total, field in (("documents", "rows"), ("tokens", "tokens"), ("factual", "factual"), ("bad", "bad")):
        summed = sum(getattr(record, field) for record in manifest.parts)
        if summed != getattr(manifest, total):
            yield f"manifest.json: {total} is {getattr(manifest, total):,}, its parts add up to {summed:,}"
    named = {record.name for record in manifest.parts if record.rows}
    for name, labels in sets.items():
        missing = named - {record.name for record in labels.parts}
        if missing:
            yield f"labels/{name}: {len(missing)} parts have no labels: {DECIDE}"
        if labels.tokens != manifest.tokens:
            yield f"labels/{name}: {labels.tokens:,} tokens, the signals have {manifest.tokens:,}"


def _strays(manifest: Manifest, listed: dict[str, dict[str, int]]) -> Iterator[str]:
    named = {f"{record.name}.parquet" for record in manifest.parts if record.rows}
    for folder, names in listed.items():
        if folder != "deadletter":
            strays = sorted(name for name in names.keys() - named if name.endswith(".parquet"))
            yield from (f"{folder}/{name}: not in the manifest" for name in strays)


def _files(record: PartRecord, labels: dict[str, dict[str, LabelRecord]]) -> Iterator[_File]:
    if record.bad:
        letters = f"{record.name}.jsonl"
        yield _File(record.name, "deadletter", letters, record.deadletter_sha256, None, record.bad)
    if record.rows:
        table = f"{record.name}.parquet"
        yield _File(record.name, "signals", table, record.sha256, record.bytes)
        for name, entries in labels.items():
            if entry := entries.get(record.name):
                yield _File(record.name, f"labels/{name}", table, entry.sha256, entry.bytes)


def _size(file: _File, listed: dict[str, dict[str, int]]) -> str:
    """The fault that a listing shows, or ""."""
    size = listed[file.folder].get(file.name)
    if size is None:
        missing = f"missing, though the part has {file.bad} bad records" if file.bad else "missing"
        return f"{missing}: {file.repair}"
    return "" if file.bytes in (None, size) else f"{size:,} bytes, it was written with {file.bytes:,}: {file.repair}"


def _batch(
    dataset: Path,
    tokenizer: _Tokenizer,
    labels: dict[str, dict[str, LabelRecord]],
    listed: dict[str, dict[str, int]],
    records: list[PartRecord],
) -> list[str]:
    """The faults of some parts."""
    faults, present = [], []
    for file in (file for record in records for file in _files(record, labels)):
        if file.name in listed[file.folder]:
            present.append(file)
        else:
            faults.append(f"{file}: {_size(file, listed)}")
    folders = {folder: dataset / folder for folder in listed}
    tables: dict[str, dict[str, pa.Table]] = {folder: {} for folder in listed}  # by folder, by part
    data = read_many([folders[file.folder] / file.name for file in present])
    for file, content in zip(present, data, strict=True):
        try:
            if sha256(content) != file.sha256:
                raise DatasetError(f"checksum differs from the manifest: remove it, then {file.repair}")
            if file.folder != "deadletter":
                tables[file.folder][file.part] = parse(content)
        except DatasetError as error:
            faults.append(f"{file}: {error}")
        except (OSError, pa.ArrowException) as error:
            faults.append(f"{file}: cannot be read: {str(error).splitlines()[0]}")
    signals = tables.pop("signals")
    measured = [(record, signals[record.name]) for record in records if record.name in signals]
    for (record, _), fault in _located(partial(_signals, tokenizer), measured):
        faults.append(f"signals/{record.name}.parquet: {fault}")
        if fault == _COLUMNS:
            del signals[record.name]  # labels cannot be compared with it
    for name, entries in labels.items():
        decided = [
            (entries[part], table, signals[part]) for part, table in tables[f"labels/{name}"].items() if part in signals
        ]
        for (entry, *_), fault in _located(_labels, decided):
            faults.append(f"labels/{name}/{entry.name}.parquet: {fault}")
    return faults


def _located(find: Callable[[Sequence[T]], Iterator[str]], parts: Sequence[T]) -> Iterator[tuple[T, str]]:
    """The faults of each part. `find` checks many parts at once; only a fault makes it check fewer."""
    faults = list(find(parts)) if parts else []
    if len(parts) == 1:
        yield from ((parts[0], fault) for fault in faults)
    elif faults:
        middle = len(parts) // 2
        yield from _located(find, parts[:middle])
        yield from _located(find, parts[middle:])


def _unlike(tables: list[pa.Table], schema: pa.Schema) -> str:
    """The fault in the columns of some tables, or ""."""
    first = tables[0].schema
    if any(table.schema != first for table in tables):
        return "not all have the same columns"
    return "" if first.equals(select(schema, first.names)) else _COLUMNS


def _signals(tokenizer: _Tokenizer, parts: Sequence[tuple[PartRecord, pa.Table]]) -> Iterator[str]:
    tables = [table for _, table in parts]
    if unlike := _unlike(tables, SIGNALS):
        yield unlike
        return
    columns = join(tables)
    lists = [name for name in TOKEN_COLUMNS if name in columns]
    offsets = columns["token_ids"].offsets.to_numpy()
    for (record, table), (start, end) in zip(parts, bounds(offsets, tables), strict=True):
        counts = (table.num_rows, end - start)
        if counts != (record.rows, record.tokens):
            yield f"{counts[0]} documents and {counts[1]} tokens, the manifest says {record.rows} and {record.tokens}"
    uneven = [name for name in lists if not np.array_equal(columns[name].offsets.to_numpy(), offsets)]
    if uneven:
        yield f"lists of unequal length: {', '.join(uneven)}"
        return
    if len(columns["doc_id"].unique()) != len(columns["doc_id"]):
        yield "a doc_id occurs twice"
    ids = columns["token_ids"].values.to_numpy()
    starts, ends = (columns[name].values.to_numpy() for name in ("token_starts", "token_ends"))
    if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        yield "a token id is beyond the vocabulary"
    if (ids == tokenizer.call_id).any():
        yield f"{CALL} stands among the tokens"
    filled = np.diff(offsets) > 0
    first = np.zeros(len(ids), bool)
    first[offsets[:-1][filled]] = True
    if (starts > ends).any() or (starts[1:] < starts[:-1])[~first[1:]].any() or (starts[first] < 0).any():
        yield "token offsets do not rise"
    for name, table_of_codes in (("pos", codes.POS), ("ent_type", codes.ENT_TYPES)):
        if len(ids) and columns[name].values.to_numpy().max() >= len(table_of_codes):
            yield f"{name} has a code that lacy.schemas.codes does not know"
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
        lengths = pc.fill_null(pc.utf8_length(columns["text"]), 0).to_numpy()
        if (ends[offsets[1:][filled] - 1] > lengths[filled]).any():
            yield "a token ends behind its text"


def _labels(parts: Sequence[tuple[LabelRecord, pa.Table, pa.Table]]) -> Iterator[str]:
    tables, measured = [table for _, table, _ in parts], [table for _, _, table in parts]
    if unlike := _unlike(tables, LABELS) or _unlike(measured, SIGNALS):
        yield unlike
        return
    decided, signals = pa.concat_tables(tables), pa.concat_tables(measured)
    for name in decided.schema.names:
        if name != "label" and (name not in signals.schema.names or not decided[name].equals(signals[name])):
            yield f"{name} differs from the signals"
    labels, tokens = decided["label"].combine_chunks(), decided["token_ids"].combine_chunks()
    label, offsets = labels.values.to_numpy(), labels.offsets.to_numpy()
    if not np.array_equal(offsets, tokens.offsets.to_numpy()):
        yield "lists of unequal length: label"
        return
    if ((label < 0) | (label > codes.IGNORE)).any():
        yield "an unknown label code"
        return
    delegated, ignored = (np.append(0, np.cumsum(label == code)) for code in (codes.DELEGATE, codes.IGNORE))
    for (entry, *_), (start, end) in zip(parts, bounds(offsets, tables), strict=True):
        counts = (delegated[end] - delegated[start], ignored[end] - ignored[start])
        if counts != (entry.delegated, entry.ignored):
            yield "counts of labels differ from _policy.json"
    if (label[offsets[:-1][np.diff(offsets) > 0]] != codes.LEARN).any():
        yield "the first token of a document is not labelled learn"
