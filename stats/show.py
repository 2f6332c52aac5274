"""Labelled text in colour: some lines of documents, with the tokens marked that a policy delegates or ignores."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

import duckdb
from rich.console import Console
from rich.text import Text

from schemas.codes import DELEGATE, IGNORE, LABELS, LEARN
from schemas.manifest import DatasetError, label_sets, read_complete
from stats.connect import connect, one_line
from stats.printable import printable
from stats.tables import pick_labels

CHARACTERS: Final = 600  # of each document
_LEAD: Final = 80  # characters before the first marked token, when that comes late


@dataclass(frozen=True)
class _Mark:
    style: str
    left: str  # where nothing can be styled, in a file
    right: str
    meaning: str


_MARKS: Final = {
    DELEGATE: _Mark("bold underline yellow", "⟦", "⟧", "delegated to the larger model"),
    IGNORE: _Mark("italic underline cyan", "⟨", "⟩", "ignored in training"),
}


@dataclass(frozen=True)
class _Document:
    doc_id: str
    text: str
    labels: list[int]  # (tokens,)
    marks: bytearray  # (characters,), the label of each


def render(
    dataset: str | Path,
    documents: int | Sequence[str] = 2,
    *,
    labels: str | None = None,
    console: Console,
    characters: int = CHARACTERS,
) -> None:
    """Print up to `characters` of some documents, marked as the label set `labels` says, and a legend.

    `documents` are ids, or how many: the first that have a marked token. `labels` None takes what `lacy stats` takes.
    An excerpt begins where its document does, or shortly before its first marked token when that comes late.

    Raises DatasetError for a dataset that is missing, unfinished or damaged, that has no text or no such label set,
    and for an id that is not in it.
    """
    folder = Path(dataset)
    parts = [part.name for part in read_complete(folder).parts if part.rows]
    name = pick_labels(folder, label_sets(folder), labels)
    if name is None:
        raise DatasetError(f"{dataset} has no labels: lacy decide makes them")
    with connect(folder) as connection:
        try:
            ids = _first(connection, parts, name, documents) if isinstance(documents, int) else documents
            shown = [_document(connection, folder, name, doc_id) for doc_id in ids]
        except duckdb.Error as error:
            raise DatasetError(f"{dataset} cannot be read: {one_line(error)} (lacy check says more)") from None
    for document in shown:
        console.print()
        console.print(_heading(document))
        console.print(_excerpt(document, characters, styled=console.is_terminal))
    console.print()
    console.print(_legend(name, shown, styled=console.is_terminal))


def _first(connection: duckdb.DuckDBPyConnection, parts: list[str], labels: str, count: int) -> list[str]:
    """The first documents with a marked token, then any others; it stops at the part that has enough."""
    marked: list[str] = []
    others: list[str] = []
    for part in parts:
        if len(marked) >= count:
            break
        rows = connection.execute("SELECT doc_id FROM documents WHERE part = ?", [part]).fetchall()
        found = connection.execute(
            "SELECT DISTINCT doc_id FROM labels WHERE labels = ? AND part = ? AND label <> ?",
            [labels, part, LABELS[LEARN]],
        ).fetchall()
        with_mark = set(found)
        for row in rows:
            (marked if row in with_mark else others).append(row[0])
    return (marked + others)[:count]


def _document(connection: duckdb.DuckDBPyConnection, folder: Path, labels: str, doc_id: str) -> _Document:
    row = connection.execute("SELECT text FROM documents WHERE doc_id = ?", [doc_id]).fetchone()
    if row is None:
        raise DatasetError(f"{folder} has no document {doc_id!r}")
    (text,) = row
    if text is None:
        raise DatasetError(f"{folder} has no text to show: it was made with --no-text")
    tokens = connection.execute(
        "SELECT token_start, token_end, label FROM labels WHERE labels = ? AND doc_id = ? ORDER BY position",
        [labels, doc_id],
    ).fetchall()
    marks = bytearray(len(text))
    codes = []
    for start, end, label in tokens:
        code = LABELS.index(label)
        codes.append(code)
        if code != LEARN:
            if not (start and marks[start - 1] == code):  # the space before the first word is not marked
                start = end - len(text[start:end].lstrip())
            marks[start:end] = bytes([code]) * (end - start)
    return _Document(doc_id, text, codes, marks)


def _heading(document: _Document) -> Text:
    counts = [
        f"{document.labels.count(code):,} {mark.meaning.split()[0]}"
        for code, mark in _MARKS.items()
        if code in document.labels
    ]
    tokens = f"{len(document.labels):,} tokens"
    return Text.assemble((printable(document.doc_id), "bold"), (f"  {', '.join([tokens, *counts])}", "dim"))


def _excerpt(document: _Document, characters: int, *, styled: bool) -> Text:
    start, end = _window(document, characters)
    excerpt = Text("…" if start else "")
    place = start
    for code, run in groupby(document.marks[start:end]):
        stop = place + len(list(run))
        excerpt.append_text(_run(document.text[place:stop], code, styled))
        place = stop
    return excerpt.append("…" if end < len(document.text) else "")


def _window(document: _Document, characters: int) -> tuple[int, int]:
    """Half-open, cut at whitespace where there is some near."""
    text = document.text
    first = next((place for place, code in enumerate(document.marks) if code != LEARN), 0)
    start = 0
    if first >= characters // 2:
        lead = max(0, first - _LEAD)
        start = next((place + 1 for place in range(lead, first) if text[place].isspace()), first)
    end = start + characters
    if end >= len(text):
        return start, len(text)
    return start, next((place for place in range(end, max(start, end - _LEAD), -1) if text[place].isspace()), end)


def _run(text: str, code: int, styled: bool) -> Text:
    """Corpus text as it is: no markup is read out of it, and nothing in it steers the terminal."""
    if code == LEARN:
        return Text(printable(text))
    mark = _MARKS[code]
    return Text(printable(text), style=mark.style) if styled else Text(f"{mark.left}{printable(text)}{mark.right}")


def _legend(labels: str, documents: Sequence[_Document], *, styled: bool) -> Text:
    legend = Text(f"Labels {printable(labels)}: ")
    for code, mark in _MARKS.items():
        if any(code in document.labels for document in documents):
            legend.append_text(_run(mark.meaning, code, styled)).append(", ")
    return legend.append("the rest is learned")
