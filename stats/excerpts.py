"""The documents that the report shows: their choice, and their tokens as compact JSON.

A document is a dict of JSON values, one entry a token in each list and one character a token in each string:

    id, source, tokens          `tokens` counts all of them; the lists hold as many as are shown
    text                        in one string, a visible mark for each control character, line ends kept; the token
                                ids where the dataset has no text
    start, length               of each token in `text`, in UTF-16 units as scripts count them; `start` as differences
    pos, ent, correct           codes, as characters from CODES on; `correct` 0 unknown, 1 no, 2 yes
    factual                     0 or 1
    ref, student                losses in thousandths of a nat, null where there is none
    judge                       in percent, null where there is none
    labels                      a string of codes for each label set
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lacy.schemas.codes import LEARN
from lacy.schemas.errors import DatasetError, SqlError
from lacy.schemas.manifest import Manifest, labels_path, signals_path
from lacy.schemas.parts import SIGNALS
from lacy.schemas.printable import printable
from lacy.stats.compute import parameters, tokens_where
from lacy.stats.connect import connect, one_line

CODES: Final = 48  # "0"
LOSS_UNITS: Final = 1000  # in a nat
SHORT: Final = 32  # tokens; a shorter document is among the most delegated only where too few are longer
_MOST_NATS: Final = 1000.0

Row = tuple[str, int]  # a part, and the document's row in it
Document = dict[str, Any]


def choose(
    dataset: Path, manifest: Manifest, labels: str | None, count: int, ids: Sequence[str] | None = None
) -> list[Row]:
    """Choose up to `count` documents, in the dataset's order.

    Half are those with the largest share of tokens that `labels` delegates or ignores, the others are spread evenly
    over the rest. They are among `ids`, or all documents where that is None.

    Raises DatasetError for a damaged part.
    """
    parts = [part for part in manifest.parts if part.rows]
    part = np.repeat(np.arange(len(parts)), [record.rows for record in parts])
    row = np.concatenate([np.arange(record.rows) for record in parts]) if parts else part
    share, tokens = np.zeros(len(row)), np.zeros(len(row), np.int64)
    allowed = np.ones(len(row), bool)
    first = 0
    for record in parts if labels is not None or ids is not None else []:
        place = slice(first, first + record.rows)
        first += record.rows
        if labels is not None:
            share[place], tokens[place] = _chosen(labels_path(dataset, labels, record.name), record.rows)
        if ids is not None:
            names = _read(signals_path(dataset, record.name), ["doc_id"])["doc_id"]
            allowed[place] = pc.is_in(names, pa.array(ids, pa.string())).to_numpy()
    places = np.flatnonzero(allowed)
    order = places[np.lexsort((places, -share[places], tokens[places] < SHORT))]
    most = order[: (count + 1) // 2] if labels is not None else order[:0]
    others = np.setdiff1d(places, most)
    wanted = min(count - len(most), len(others))
    spread = others[(np.arange(wanted) * 2 + 1) * len(others) // (2 * max(1, wanted))]
    return [(parts[part[place]].name, int(row[place])) for place in np.sort(np.concatenate([most, spread]))]


def matching(dataset: Path, labels: str | None, where: str) -> list[str]:
    """The ids of the documents with a token that meets a condition, as in `lacy.stats.compute.compute`.

    Raises SqlError for a condition that DuckDB does not understand.
    """
    with connect(dataset) as connection:
        try:
            sql = f"SELECT DISTINCT doc_id {tokens_where(labels, where)}"
            found = connection.execute(sql, parameters(labels)).fetchall()
        except duckdb.Error as error:
            raise SqlError(one_line(error)) from None
    return [doc_id for (doc_id,) in found]


def find(dataset: Path, ids: Sequence[str]) -> list[Row]:
    """Locate the documents with these ids, in the order given. Raises DatasetError for an unknown id."""
    with connect(dataset) as connection:
        try:
            listed = connection.execute(
                "SELECT doc_id, part FROM documents WHERE doc_id IN (SELECT unnest(?))", [list(ids)]
            ).fetchall()
        except duckdb.Error as error:
            raise DatasetError(
                f"{dataset} cannot be read: {one_line(error)}: run lacy check {dataset} to list all damage"
            ) from None
    part_of = dict(listed)
    for doc_id in ids:
        if doc_id not in part_of:
            raise DatasetError(f"{dataset} has no document {doc_id!r}", usage=True)
    names = {part: _read(signals_path(dataset, part), ["doc_id"])["doc_id"] for part in set(part_of.values())}
    return [(part_of[doc_id], names[part_of[doc_id]].index(doc_id).as_py()) for doc_id in dict.fromkeys(ids)]


def read(dataset: Path, rows: Sequence[Row], sets: Sequence[str], tokens: int) -> list[Document]:
    """Read the first `tokens` tokens of the documents at `rows`, with the labels of `sets`.

    Raises DatasetError for a damaged part.
    """
    found: dict[Row, Document] = {}
    for part in dict.fromkeys(part for part, _ in rows):
        path = signals_path(dataset, part)
        wanted = [row for of, row in rows if of == part]
        signals = _take(path, list(SIGNALS.names), wanted)
        labels = [_take(labels_path(dataset, name, part), ["doc_id", "label"], wanted) for name in sets]
        for place, row in enumerate(wanted):
            try:
                found[part, row] = _document(signals, labels, place, tokens)
            except (ValueError, IndexError):
                raise _damaged(path) from None
    return [found[row] for row in rows]


def _document(signals: pa.Table, labels: list[pa.Table], place: int, limit: int) -> Document:
    """Raises ValueError or IndexError where the lists of the document do not fit each other."""

    def column(name: str) -> npt.NDArray[Any]:
        return signals[name][place].values.slice(0, limit).to_numpy(zero_copy_only=False)

    doc_id, source = signals["doc_id"][place].as_py(), signals["source"][place].as_py()
    text = signals["text"][place].as_py() if "text" in signals.column_names else None
    ids = column("token_ids")
    whole = len(signals["token_ids"][place])
    if text is None:
        text, start, end = _as_numbers(ids)
    else:
        start, end = column("token_starts"), column("token_ends")
        text = printable(text, keep_lines=True)
        text = text[: end.max(initial=0)] if len(ids) < whole else text
    units = _utf16(text)
    start, end = units[start], units[end]
    document: Document = {
        "id": printable(doc_id),
        "source": printable(source),
        "tokens": whole,
        "text": text,
        "start": np.diff(start, prepend=0).tolist(),
        "length": (end - start).tolist(),
        "factual": _codes(column("factual").astype(np.uint8)),
        "pos": _codes(column("pos")),
        "ent": _codes(column("ent_type")),
        "ref": _numbers(column("ref_nll"), LOSS_UNITS),
        "labels": [],
    }
    if "ref_correct" in signals.column_names:
        correct = signals["ref_correct"][place].values.slice(0, limit)
        document["correct"] = _codes(np.array([0 if v is None else 1 + v for v in correct.to_pylist()], np.uint8))
    if "student_nll" in signals.column_names:
        document["student"] = _numbers(column("student_nll"), LOSS_UNITS)
    if "judge" in signals.column_names:
        document["judge"] = _numbers(column("judge"), 100)
    for table in labels:
        codes = table["label"][place].values.slice(0, limit).to_numpy(zero_copy_only=False)
        if table["doc_id"][place].as_py() != doc_id:
            raise ValueError
        document["labels"].append(_codes(codes.astype(np.uint8)))
    lists = [
        document[name]
        for name in ("start", "factual", "pos", "ent", "ref", "correct", "student", "judge")
        if name in document
    ]
    if any(len(values) != len(ids) for values in [*lists, *document["labels"]]):
        raise ValueError
    return document


def _as_numbers(ids: npt.NDArray[Any]) -> tuple[str, npt.NDArray[Any], npt.NDArray[Any]]:
    """The ids in words' places, and the offsets of each."""
    words = [str(token) for token in ids]
    lengths = np.array([len(word) for word in words], np.int64)
    start = np.cumsum(lengths + 1) - lengths - 1
    return " ".join(words), start, start + lengths


def _utf16(text: str) -> npt.NDArray[np.int64]:
    """(characters + 1,): how many UTF-16 units stand before each code point, and in all."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return np.concatenate([[0], np.cumsum(1 + (points > 0xFFFF))]).astype(np.int64)


def _codes(values: npt.NDArray[np.uint8]) -> str:
    return (values + np.uint8(CODES)).tobytes().decode("latin-1")


def _numbers(values: npt.NDArray[Any], units: int) -> list[int | None]:
    """Whole numbers of a unit; None for NaN."""
    known = ~np.isnan(values)
    scaled = np.rint(np.clip(np.where(known, values, 0), -_MOST_NATS, _MOST_NATS) * units).astype(np.int64)
    return [value if there else None for value, there in zip(scaled.tolist(), known.tolist(), strict=True)]


def _chosen(path: Path, rows: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(rows,) the share of each document's tokens that are not learned, and (rows,) its tokens."""
    labels = _read(path, ["label"])["label"].combine_chunks()
    tokens = pc.list_value_length(labels).to_numpy(zero_copy_only=False).astype(np.int64)
    if len(tokens) != rows:
        raise _damaged(path)
    before = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy(zero_copy_only=False) != LEARN)])
    ends = np.cumsum(tokens)
    return (before[ends] - before[ends - tokens]) / np.maximum(1, tokens), tokens


def _take(path: Path, columns: list[str], rows: list[int]) -> pa.Table:
    table = _read(path, columns)
    if max(rows) >= table.num_rows:
        raise _damaged(path)
    return table.take(pa.array(rows))


def _read(path: Path, columns: list[str]) -> pa.Table:
    """Those of `columns` that the file has."""
    try:
        with path.open("rb") as source, pq.ParquetFile(source) as file:
            return file.read([name for name in columns if name in file.schema_arrow.names])
    except (OSError, pa.ArrowException):
        raise _damaged(path) from None


def _damaged(path: Path) -> DatasetError:
    return DatasetError(f"{path} is missing or damaged: run lacy check DATASET to list all damage")
