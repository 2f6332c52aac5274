"""Label shards, on disk or in an object store: what of a dataset can be learnt from, and its parts, checked as read."""

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lacy.schemas.codes import LABELS as LABEL_NAMES
from lacy.schemas.codes import LEARN
from lacy.schemas.errors import DatasetError
from lacy.schemas.files import read_bytes, sha256
from lacy.schemas.manifest import LabelRecord, LabelSet, Manifest, at, label_sets, labels_path, read_complete
from lacy.schemas.parts import LABELS

DEFAULT_LABELS: Final = "lacy"

# What stands at an end token.
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
    """A label set to learn from."""

    root: Path  # of the dataset; a UPath, which has the same methods, in an object store
    name: str
    records: tuple[LabelRecord, ...] = field(repr=False)  # parts with documents, in corpus order
    tokens: int
    call_id: int
    eos_id: int
    eos_token: str
    vocab_size: int  # the largest id of the tokenizer, and one
    tokenizer_json: bytes = field(repr=False)
    tokenizer_config: dict[str, Any] = field(repr=False)
    fingerprint: str  # of the tokenizer and the bytes of all parts


@dataclass(frozen=True)
class Documents:
    """D documents one after the other, each with its end token in front.

    lengths  (D,) int64, tokens with the end token
    arrays   "ids" and columns, each (sum of lengths,)
    """

    lengths: np.ndarray
    arrays: Arrays


def open_labels(dataset: str, labels: str | None) -> Labels:
    """The label set `labels` of a folder or URL; None takes DEFAULT_LABELS where there is one, else the first by name.

    Raises DatasetError when there is none, when it does not cover the dataset, or when the dataset's tokenizer is not
    the one that it was labelled with or lacks <CALL> or an end token.
    """
    root = at(dataset) if "://" in dataset else Path(dataset).absolute()
    manifest = read_complete(root)
    found = _pick(dataset, label_sets(root), labels)
    _covers(dataset, manifest, found)
    records = tuple(record for record in found.parts if record.rows)
    content, settings, eos_token = _tokenizer_files(root, manifest)
    eos_id, vocab_size = _ids(root, content, eos_token)
    call_id = manifest.tokenizer.get("call_id")
    if not isinstance(call_id, int) or not 0 <= call_id < vocab_size:
        raise DatasetError(f"the tokenizer of {dataset} has no <CALL>: label the corpus again, into a new folder")
    identity = [manifest.tokenizer["sha256"], *((record.name, record.sha256) for record in records)]
    return Labels(
        root=root,
        name=found.name,
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
    """Raises DatasetError when the shards have nothing in a column, by the first part that could."""
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
                raise DatasetError(f"{labels.root} has no {name}: {_REMEDIES[name]}")


@contextmanager
def opened(labels: Labels, record: LabelRecord) -> Iterator[pq.ParquetFile]:
    """A part, read once and checked against its record."""
    path = labels_path(labels.root, labels.name, record.name)
    again = f"lacy check says what else is damaged, lacy decide --name {labels.name} writes the labels again"
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: {again}") from None
    if sha256(data) != record.sha256:
        raise DatasetError(f"{path} is not the file that was written, its checksum differs: {again}")
    try:
        yield pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is no Parquet file that can be read ({_line(error)}): {again}") from None
    except _PartError as error:
        raise DatasetError(f"{path}: {error}: {again}") from None


class _PartError(Exception):
    """What is wrong with a part."""


def documents(labels: Labels, file: pq.ParquetFile, rows: np.ndarray, names: tuple[str, ...]) -> Documents:
    """The documents of some rows; those without a token are left out."""
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
        raise _PartError("<CALL> stands among the tokens")
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
    found = {name: table[_column(name)].combine_chunks() for name in names}
    for name, values in found.items():
        may_lack = name in ("ref_nll", "judge")
        if values.null_count or (values.values.null_count and not may_lack):
            raise _PartError(f"{_column(name)} has nulls")
    return found


def _column(name: str) -> str:
    return "token_ids" if name == "ids" else name


def is_held(file: pq.ParquetFile, holdout: float) -> np.ndarray:
    """(rows,) bool. A document is held out by its id alone, whatever the seed, its part and the other documents."""
    if "doc_id" not in file.schema_arrow.names:
        raise _PartError("it has no column doc_id")
    ids = file.read(["doc_id"], use_threads=False)["doc_id"].to_pylist()
    digests = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, ">u8") < holdout * 2.0**64


def _is_void(file: pq.ParquetFile, name: str) -> bool:
    values = _lists(file, [name])[name].values
    return bool(values.null_count == len(values))


def runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of runs of tokens, one after the other: int64 (sum of lengths,)."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _pick(dataset: str, sets: dict[str, LabelSet], asked: str | None) -> LabelSet:
    if not sets:
        raise DatasetError(f"{dataset} has no labels: lacy decide makes them")
    if asked is None:
        asked = DEFAULT_LABELS if DEFAULT_LABELS in sets else next(iter(sets))
    if asked not in sets:
        raise DatasetError(
            f"{dataset} has no label set {asked!r}: it has {', '.join(sets)}; lacy decide makes others", usage=True
        )
    return sets[asked]


def _covers(dataset: str, manifest: Manifest, labels: LabelSet) -> None:
    """Raises DatasetError when the labels are not those of the manifest's documents, or when there is none."""
    wanted = {record.name: (record.rows, record.tokens) for record in manifest.parts if record.rows}
    found = {record.name: (record.rows, record.tokens) for record in labels.parts if record.rows}
    if wanted != found:
        wrong = sum(wanted.get(name) != found.get(name) for name in wanted.keys() | found.keys())
        raise DatasetError(
            f"label set {labels.name!r} does not fit {dataset}, {wrong} parts differ: "
            f"lacy decide --name {labels.name} writes it again"
        )
    if not wanted:
        raise DatasetError(f"{dataset} has no document to learn from: label a corpus that has some")


def _tokenizer_files(root: Path, manifest: Manifest) -> tuple[bytes, dict[str, Any], str]:
    """tokenizer.json, tokenizer_config.json, and the end token that it names."""
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
        raise DatasetError(f"{folder} names no eos_token, which parts documents: label with a tokenizer that has one")
    return content, settings, eos


def vocabulary(tokenizer: bytes) -> dict[str, int]:
    """The ids of all tokens, by a tokenizer.json's contents. Raises Exception: the library has nothing narrower."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.decode()).get_vocab(with_added_tokens=True)


def _ids(root: Path, content: bytes, eos_token: str) -> tuple[int, int]:
    """The end token's id, and the vocabulary's size."""
    try:
        found = vocabulary(content)
    except Exception as error:
        raise DatasetError(f"{root}/tokenizer/tokenizer.json cannot be read: {_line(error)}") from None
    if eos_token not in found:
        raise DatasetError(
            f"the end token {eos_token!r} is not in the tokenizer of {root}: label with a tokenizer that has it"
        )
    return found[eos_token], max(found.values()) + 1


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
