"""Label shards, in a folder or an object store, checked as they are read."""

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lacy.schemas.codes import LABELS as LABEL_NAMES
from lacy.schemas.codes import LEARN
from lacy.schemas.errors import DatasetError
from lacy.schemas.files import read_bytes, sha256
from lacy.schemas.manifest import (
    LabelRecord,
    LabelSet,
    Manifest,
    at,
    label_sets,
    labels_path,
    pick_labels,
    read_complete,
)
from lacy.schemas.parts import LABELS

HELD_OUT: Final = 2  # documents; `lacy eval delegation` needs as many

# Values at an end token.
COLUMNS: Final = {
    "label": np.array(LEARN, np.int8),
    "factual": np.array(False),
    "ref_nll": np.array(np.nan, np.float32),
    "judge": np.array(np.nan, np.float32),
}
_REMEDIES: Final = {
    "ref_nll": "it was labelled without a reference model: lacy label with --reference, into a new folder",
    "judge": "it was labelled without a judge: lacy label with --judge, into a new folder",
}

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Labels:
    """A label set to train on."""

    root: Path  # the dataset's; a UPath, which has the same methods, in an object store
    name: str
    records: tuple[LabelRecord, ...] = field(repr=False)  # parts with documents, in corpus order
    tokens: int
    call_id: int
    eos_id: int
    eos_token: str
    vocab_size: int  # the largest id of the tokenizer plus one
    tokenizer_json: bytes = field(repr=False)
    tokenizer_config: dict[str, Any] = field(repr=False)
    fingerprint: str  # of the tokenizer and the bytes of all parts


@dataclass(frozen=True)
class Documents:
    """D documents in a row, each preceded by an end token.

    lengths  (D,) int64, tokens of each with its end token
    arrays   "ids" and columns, each (sum of lengths,)
    """

    lengths: np.ndarray
    arrays: Arrays


def open_labels(dataset: str, labels: str | None) -> Labels:
    """Open the label set `labels` of a folder or URL; None is lacy where there is one, else the first by name.

    Raises DatasetError when there is none, when it does not cover the dataset, or when the dataset's tokenizer is not
    the one that it was labelled with or lacks <CALL> or an end token.
    """
    root = at(dataset) if "://" in dataset else Path(dataset).absolute()
    manifest = read_complete(root)
    sets = label_sets(root)
    if not sets:
        raise DatasetError(f"{dataset} has no labels: lacy decide makes them")
    picked = sets[pick_labels(dataset, sets, labels) or ""]
    _covers(dataset, manifest, picked)
    records = tuple(record for record in picked.parts if record.rows)
    content, settings, eos_token = _tokenizer_files(root, manifest)
    eos_id, vocab_size = _ids(root, content, eos_token)
    call_id = manifest.tokenizer.get("call_id")
    if not isinstance(call_id, int) or not 0 <= call_id < vocab_size:
        raise DatasetError(f"the tokenizer of {dataset} has no <CALL>: label the corpus again, into a new folder")
    identity = [manifest.tokenizer["sha256"], *((record.name, record.sha256) for record in records)]
    return Labels(
        root=root,
        name=picked.name,
        records=records,
        tokens=sum(record.tokens for record in records),
        call_id=call_id,
        eos_id=eos_id,
        eos_token=eos_token,
        vocab_size=vocab_size,
        tokenizer_json=content,
        tokenizer_config=settings,
        fingerprint=sha256(json.dumps(identity).encode()),
    )


def require(labels: Labels, columns: Collection[str]) -> None:
    """Raises DatasetError when a column is missing or empty, as the first part with scorable tokens shows."""
    unknown = set(columns) - COLUMNS.keys()
    if unknown:
        raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
    asked = [name for name in _REMEDIES if name in columns]
    record = next((record for record in labels.records if record.tokens > record.rows), None)
    if not asked or record is None:
        return
    with opened(labels, record) as file:
        for name in asked:
            present = name in file.schema_arrow.names
            if not present or (name == "ref_nll" and _is_void(file, name)):
                raise DatasetError(f"{labels.root} has no {name}: {_REMEDIES[name]}", usage=True)


@contextmanager
def opened(labels: Labels, record: LabelRecord) -> Iterator[pq.ParquetFile]:
    """Open a part, read once and checked against its record. Raises DatasetError for a damaged part."""
    path = labels_path(labels.root, labels.name, record.name)
    again = f"run lacy check {labels.root} to list all damage; lacy decide --name {labels.name} writes the labels again"
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: {again}") from None
    if sha256(data) != record.sha256:
        raise DatasetError(f"{path} is not the file that was written, its checksum differs: {again}")
    try:
        yield pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read as Parquet ({_line(error)}): {again}") from None
    except _PartError as error:
        raise DatasetError(f"{path}: {error}: {again}") from None


class _PartError(Exception):
    """A fault of a part."""


def documents(labels: Labels, file: pq.ParquetFile, rows: np.ndarray, names: tuple[str, ...]) -> Documents:
    """Read the documents of some rows, without those that have no token."""
    lists = _lists(file, names)
    offsets = lists["ids"].offsets.to_numpy()
    for name, values in lists.items():
        if not np.array_equal(values.offsets.to_numpy(), offsets):
            raise _PartError(f"lists of {_column(name)} are not as long as those of token_ids")
    arrays = {name: values.values.to_numpy(zero_copy_only=False) for name, values in lists.items()}
    ids = arrays["ids"]
    if len(ids) and not 0 <= ids.min() <= ids.max() < labels.vocab_size:
        raise _PartError(f"a token id is not one of the tokenizer's {labels.vocab_size}")
    if (ids == labels.call_id).any():
        raise _PartError("<CALL> is among the tokens")
    if len(ids) and "label" in arrays and not 0 <= arrays["label"].min() <= arrays["label"].max() < len(LABEL_NAMES):
        raise _PartError("a label is none of " + ", ".join(LABEL_NAMES))
    rows = rows[np.diff(offsets)[rows] > 0]
    lengths = np.diff(offsets)[rows].astype(np.int64) + 1
    index = runs(offsets[rows] - 1, lengths)
    ends = COLUMNS | {"ids": np.array(labels.eos_id, np.int32)}
    firsts = np.cumsum(lengths) - lengths
    for name, values in arrays.items():
        arrays[name] = values.take(index, mode="clip")  # the end token of the first document is at -1
        arrays[name][firsts] = ends[name]
    return Documents(lengths, arrays)


def _lists(file: pq.ParquetFile, names: Iterable[str]) -> dict[str, pa.ListArray]:
    for name in names:
        column = _column(name)
        if column not in file.schema_arrow.names:
            raise _PartError(f"it has no column {column}")
        if file.schema_arrow.field(column).type != LABELS.field(column).type:
            raise _PartError(f"its column {column} is {file.schema_arrow.field(column).type}")
    table = file.read([_column(name) for name in names], use_threads=False)
    lists = {name: table[_column(name)].combine_chunks() for name in names}
    for name, values in lists.items():
        may_lack = name in ("ref_nll", "judge")
        if values.null_count or (values.values.null_count and not may_lack):
            raise _PartError(f"{_column(name)} has nulls")
    return lists


def _column(name: str) -> str:
    return "token_ids" if name == "ids" else name


def is_held(file: pq.ParquetFile, holdout: float) -> np.ndarray:
    """(rows,) bool: which documents are held out. Only its id decides, not the seed, the part or other documents."""
    return _hashes(file) < holdout * 2.0**64


def enough_held_out(labels: Labels, holdout: float) -> tuple[float, int]:
    """A share of the documents that holds some out of a small dataset too, and how many, counted up to HELD_OUT.

    It is `holdout` where that is 0 or holds out a document with tokens. Otherwise it is the least share that holds out
    HELD_OUT documents, or half of them where there are fewer than twice as many. Raises DatasetError for a damaged
    part.
    """
    count, lowest = 0, np.zeros(0, np.uint64)
    if not holdout:
        return 0.0, 0
    for record in labels.records:
        with opened(labels, record) as file:
            filled = pc.greater(pc.list_value_length(_lists(file, ["ids"])["ids"]), 0).to_numpy(zero_copy_only=False)
            hashes = _hashes(file)[filled]
        count += int((hashes < holdout * 2.0**64).sum())
        if count >= HELD_OUT:
            return holdout, HELD_OUT
        lowest = np.sort(np.concatenate([lowest, hashes]))[: 2 * HELD_OUT]
    if count:
        return holdout, count
    count = min(HELD_OUT, len(lowest) // 2)
    return (float(np.nextafter(lowest[count - 1] / 2.0**64, 1)) if count else holdout), count


def _hashes(file: pq.ParquetFile) -> np.ndarray:
    """(rows,) uint64, of the documents' ids."""
    if "doc_id" not in file.schema_arrow.names:
        raise _PartError("it has no column doc_id")
    ids = file.read(["doc_id"], use_threads=False)["doc_id"].to_pylist()
    digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, ">u8")


def _is_void(file: pq.ParquetFile, name: str) -> bool:
    values = _lists(file, [name])[name].values
    return bool(values.null_count == len(values))


def runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of the tokens of several runs, concatenated: int64 (sum of lengths,)."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _covers(dataset: str, manifest: Manifest, labels: LabelSet) -> None:
    """Raises DatasetError when the labels do not fit the manifest's documents, or when there are no documents."""
    wanted = {record.name: (record.rows, record.tokens) for record in manifest.parts if record.rows}
    labelled = {record.name: (record.rows, record.tokens) for record in labels.parts if record.rows}
    if wanted != labelled:
        wrong = sum(wanted.get(name) != labelled.get(name) for name in wanted.keys() | labelled.keys())
        raise DatasetError(
            f"label set {labels.name!r} does not fit {dataset}, {wrong} parts differ: "
            f"lacy decide --name {labels.name} writes it again"
        )
    if not wanted:
        raise DatasetError(f"{dataset} has no documents to train on: label a corpus that has some")


def _tokenizer_files(root: Path, manifest: Manifest) -> tuple[bytes, dict[str, Any], str]:
    """Read tokenizer.json, tokenizer_config.json and the end token that it names."""
    folder = root / "tokenizer"
    again = "copy the whole dataset again, or label the corpus again, into a new folder"
    try:
        content = read_bytes(folder / "tokenizer.json")
        if sha256(content) != manifest.tokenizer.get("sha256"):
            raise DatasetError(f"{folder}/tokenizer.json is not the tokenizer of the manifest: {again}")
        settings = json.loads(read_bytes(folder / "tokenizer_config.json"))
        eos = settings.get("eos_token")
    except FileNotFoundError as error:
        raise DatasetError(f"{folder} is incomplete ({_line(error)}): {again}") from None
    except (ValueError, AttributeError):
        raise DatasetError(f"{folder}/tokenizer_config.json is damaged: {again}") from None
    if isinstance(eos, dict):
        eos = eos.get("content")
    if not isinstance(eos, str):
        raise DatasetError(
            f"{folder} names no eos_token to separate documents with: label with a tokenizer that has one"
        )
    return content, settings, eos


def vocabulary(tokenizer: bytes) -> dict[str, int]:
    """Read the ids of all tokens from a tokenizer.json. Raises Exception, since the library has nothing narrower."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.decode()).get_vocab(with_added_tokens=True)


def _ids(root: Path, content: bytes, eos_token: str) -> tuple[int, int]:
    """The id of the end token and the size of the vocabulary."""
    try:
        ids = vocabulary(content)
    except Exception as error:
        raise DatasetError(f"{root}/tokenizer/tokenizer.json cannot be read: {_line(error)}") from None
    if eos_token not in ids:
        raise DatasetError(
            f"the end token {eos_token!r} is not in the tokenizer of {root}: label with a tokenizer that has it"
        )
    return ids[eos_token], max(ids.values()) + 1


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
