"""Labelled text in the terminal: documents with their tokens tinted by label or by loss, and a table of the tokens."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal, get_args

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.pager import SystemPager
from rich.text import Text

from lacy.schemas.codes import DELEGATE, IGNORE, LABELS, LEARN
from lacy.schemas.errors import DatasetError, UsageError
from lacy.schemas.manifest import at, label_sets, pick_labels, read_complete
from lacy.schemas.printable import printable
from lacy.stats.connect import connect, one_line

Color = Literal["label", "loss"]
Dataset = str | os.PathLike[str]

CHARACTERS: Final = 600  # of a document in an excerpt
LOSSES: Final = (1.0, 2.0, 4.0, 8.0)  # nats, where the steps of the scale begin
CLOSE: Final = 3  # ids that are named where one is not found
_CLOSE_ENOUGH: Final = 0.85  # Jaro-Winkler similarity of two ids
_LEAD: Final = 80  # characters before the first marked token, when that comes late
_WIDEST: Final = 32  # columns of a token in the table
_PLAIN = 0  # a code that is not marked


@dataclass(frozen=True)
class _Mark:
    style: str
    left: str  # where nothing can be styled, in a file
    right: str
    meaning: str


# Foreground and background are given together, so that they stand out from any terminal's own. The colour gets purer
# from step to step, what the colour-blind see too; the first and the last step have no need of colour.
_SCALES: Final[dict[Color, dict[int, _Mark]]] = {
    "label": {
        DELEGATE: _Mark("bold underline yellow", "⟦", "⟧", "delegated to the larger model"),
        IGNORE: _Mark("italic underline cyan", "⟨", "⟩", "ignored in training"),
    },
    "loss": {
        1: _Mark("underline", "⟦", "⟧₁", f"{LOSSES[0]:g} to {LOSSES[1]:g}"),
        2: _Mark("color(16) on color(186)", "⟦", "⟧₂", f"{LOSSES[1]:g} to {LOSSES[2]:g}"),
        3: _Mark("color(16) on color(214)", "⟦", "⟧₃", f"{LOSSES[2]:g} to {LOSSES[3]:g}"),
        4: _Mark("bold underline color(231) on color(124)", "⟦", "⟧₄", f"{LOSSES[3]:g} or more"),
    },
}


@dataclass(frozen=True)
class _Document:
    doc_id: str
    source: str
    text: str | None
    tokens: pa.Table  # rows of the view `tokens`, by position
    labels: dict[str, list[str]]  # by label set, a name for each token

    def codes(self, labels: str | None, color: Color) -> npt.NDArray[np.uint8]:
        """(tokens,), keys of the scale or _PLAIN."""
        if color == "loss":
            return loss_steps(self.losses())
        if labels is None:
            return np.zeros(len(self.tokens), np.uint8)
        return np.array([LABELS.index(name) for name in self.labels[labels]], np.uint8)

    def losses(self) -> npt.NDArray[np.float32]:
        """(tokens,), nats; NaN where there is no score."""
        return self.tokens["ref_nll"].to_numpy().astype(np.float32)

    def marks(self, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """(characters,). The space before the first word of a marked run is not marked."""
        text = self.text or ""
        marks = np.zeros(len(text), np.uint8)
        starts, ends = self.tokens["token_start"].to_pylist(), self.tokens["token_end"].to_pylist()
        for token in np.flatnonzero(codes):
            start, end, code = starts[token], ends[token], codes[token]
            if not (start and marks[start - 1] == code):
                start = end - len(text[start:end].lstrip())
            marks[start:end] = np.maximum(marks[start:end], code)
        return marks


def loss_steps(losses: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The step of the scale for each loss in nats: how many of LOSSES it reaches; 0 for NaN."""
    steps = np.searchsorted(np.array(LOSSES, np.float32), losses, side="right")
    return np.where(np.isnan(losses), 0, steps).astype(np.uint8)


def show(
    dataset: Dataset,
    doc_id: str,
    *,
    labels: str | None = None,
    color: Color = "label",
    signals: bool = False,
    console: Console,
) -> None:
    """Print a whole document, its tokens tinted by label or by loss, below a heading and a legend.

    With `signals` a table replaces the text: one row for each token, as wide as necessary, with the labels of all label
    sets, or of `labels` alone. `labels` None is the label set that `lacy stats` uses.

    Raises UsageError for another colour; DatasetError for a dataset that is missing, unfinished or damaged, that has
    no such label set or document, and for a text or losses to show that it does not have.
    """
    _require_color(color)
    root = at(dataset)
    read_complete(root)
    sets = label_sets(root)
    name = pick_labels(root, sets, labels)
    wanted = list(sets) if signals and labels is None else [name] if name is not None else []
    with _reading(dataset) as connection:
        document = _document(connection, dataset, doc_id, wanted)
    if color == "loss":
        _require_losses(dataset, [document])
    if document.text is None and not signals:
        raise DatasetError(f"{dataset} has no text to show: it was made with --no-text (--signals shows its tokens)")
    codes = document.codes(name, color)
    scale, styled = _SCALES[color], _styled(console, color)
    console.print(_heading(document, name))
    console.print(_legend(name, codes, scale, color, styled))
    console.print()
    if signals:
        for line in _table(document, codes, scale, styled):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
        return
    marks = document.marks(codes)
    console.print(
        _marked(document.text or "", marks, scale, styled, keep_lines=True), soft_wrap=not console.is_terminal
    )


def render(
    dataset: Dataset,
    documents: int | Sequence[str] = 2,
    *,
    labels: str | None = None,
    color: Color = "label",
    console: Console,
    characters: int = CHARACTERS,
) -> None:
    """Print up to `characters` of some documents, tinted as in `show`, and a legend.

    `documents` are ids, or the number of documents: the first with a marked token. `labels` None is the label set that
    `lacy stats` uses. An excerpt begins with its document, or shortly before its first marked token if that comes late.

    Raises what `show` does, and DatasetError for a dataset without any label set.
    """
    _require_color(color)
    root = at(dataset)
    parts = [part.name for part in read_complete(root).parts if part.rows]
    name = pick_labels(root, label_sets(root), labels)
    if name is None:
        raise DatasetError(
            f"{dataset} has no labels: lacy decide makes them (pass a DOC_ID to see a document without labels)"
        )
    with _reading(dataset) as connection:
        ids = _first(connection, parts, name, documents) if isinstance(documents, int) else documents
        found = [_document(connection, dataset, doc_id, [name]) for doc_id in ids]
    if color == "loss":
        _require_losses(dataset, found)
    scale, styled = _SCALES[color], _styled(console, color)
    seen = np.zeros(0, np.uint8)
    for document in found:
        if document.text is None:
            raise DatasetError(f"{dataset} has no text to show: it was made with --no-text")
        codes = document.codes(name, color)
        seen = np.concatenate([seen, codes])
        console.print()
        console.print(_heading(document, name))
        console.print(_excerpt(document.text, document.marks(codes), characters, scale, styled))
    console.print()
    console.print(_legend(name, seen, scale, color, styled))


@contextmanager
def paged(console: Console) -> Iterator[None]:
    """Show the output of the block in $PAGER, or less, when `console` is a terminal and the output is longer.

    It is printed directly where stdin is not a terminal, since no key would reach the pager. `less` gets -R, without
    which it shows colours as codes. Nothing is printed when the block raises.
    """
    if not console.is_terminal:
        yield
        return
    with console.capture() as captured:
        yield
    text = captured.get()
    if text.count("\n") < console.height or not sys.stdin.isatty():
        console.file.write(text)
        return
    before = os.environ.get("LESS")
    os.environ["LESS"] = f"-R {before or ''}".rstrip()
    try:
        SystemPager().show(text)
    finally:
        del os.environ["LESS"]
        if before is not None:
            os.environ["LESS"] = before


def _require_color(color: str) -> None:
    if color not in get_args(Color):
        raise UsageError(f"--color {color} is unknown: use {' or '.join(get_args(Color))}")


def _require_losses(dataset: Dataset, documents: Sequence[_Document]) -> None:
    if documents and all(np.isnan(document.losses()).all() for document in documents):
        raise DatasetError(f"{dataset} has no losses here: it was labelled without a reference model", usage=True)


@contextmanager
def _reading(dataset: Dataset) -> Iterator[duckdb.DuckDBPyConnection]:
    with connect(dataset) as connection:
        try:
            yield connection
        except duckdb.Error as error:
            raise DatasetError(
                f"{dataset} cannot be read: {one_line(error)}: run lacy check {dataset} to list all damage"
            ) from None


def _first(connection: duckdb.DuckDBPyConnection, parts: list[str], labels: str, count: int) -> list[str]:
    """Find the first documents with a marked token, then any others, and stop at the part that has enough."""
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


def _document(connection: duckdb.DuckDBPyConnection, dataset: Dataset, doc_id: str, labels: Sequence[str]) -> _Document:
    """Read a document. Its part is found by the ids alone; then only the files of this part are opened."""
    parts = connection.execute("SELECT part FROM documents WHERE doc_id = ?", [doc_id]).fetchall()
    if not parts:
        raise DatasetError(_not_there(connection, dataset, doc_id), usage=True)
    here = [parts[0][0], doc_id]
    texts = connection.execute("SELECT source, text FROM documents WHERE part = ? AND doc_id = ?", here).fetchall()
    source, text = texts[0]
    tokens: pa.Table = connection.sql(
        "SELECT * FROM tokens WHERE part = ? AND doc_id = ? ORDER BY position", params=here
    ).to_arrow_table()
    decided = {
        name: [
            label
            for (label,) in connection.execute(
                "SELECT label FROM labels WHERE labels = ? AND part = ? AND doc_id = ? ORDER BY position", [name, *here]
            ).fetchall()
        ]
        for name in labels
    }
    bounds = np.array([tokens["token_start"].to_numpy(), tokens["token_end"].to_numpy()])  # (2, tokens)
    fits = text is None or ((bounds[0] >= 0) & (bounds[0] <= bounds[1]) & (bounds[1] <= len(text))).all()
    known = all(len(names) == len(tokens) and set(names) <= set(LABELS) for names in decided.values())
    if not (fits and known):
        raise DatasetError(f"{dataset} is damaged at document {doc_id!r}: run lacy check {dataset} to list all damage")
    return _Document(doc_id, source, text, tokens, decided)


def _not_there(connection: duckdb.DuckDBPyConnection, dataset: Dataset, doc_id: str) -> str:
    found = connection.execute(
        """
        SELECT doc_id FROM (
            SELECT doc_id, contains(lower(doc_id), lower($id)) AS holds, jaro_winkler_similarity(doc_id, $id) AS like_it
            FROM documents
        )
        WHERE (holds AND $id <> '') OR like_it >= $enough
        ORDER BY holds DESC, like_it DESC, doc_id LIMIT $most
        """,
        {"id": doc_id, "enough": _CLOSE_ENOUGH, "most": CLOSE},
    ).fetchall()
    close = f"like it are {', '.join(repr(name) for (name,) in found)}; " if found else ""
    listed = f'lacy sql {shlex.quote(str(dataset))} "SELECT doc_id FROM documents LIMIT 10"'
    return f"{dataset} has no document {doc_id!r}: {close}{listed} names some"


def _heading(document: _Document, labels: str | None) -> Text:
    tokens = len(document.tokens)
    factual = int(np.count_nonzero(document.tokens["factual"].to_numpy()))
    figures = [f"{tokens:,} tokens", f"{factual / max(1, tokens):.1%} factual"]
    for code, mark in _SCALES["label"].items():
        count = document.labels[labels].count(LABELS[code]) if labels is not None else 0
        if count:
            figures.append(f"{count:,} {mark.meaning.split()[0]} ({count / tokens:.1%})")
    losses = document.losses()
    losses = losses[~np.isnan(losses)]
    if len(losses):
        figures.append(f"mean loss {losses.mean(dtype=np.float64):.2f}")
    title = Text(printable(document.doc_id), "bold")
    title.append(f"  {printable(document.source)}", "not bold dim").append(f"\n{', '.join(figures)}", "not bold dim")
    return title


def _styled(console: Console, color: Color) -> bool:
    """Whether marks are styles; otherwise they are brackets, as the console has no styles or too few colours."""
    return console.color_system is not None and not (console.no_color and color == "loss")


def _mark(text: str, mark: _Mark, styled: bool) -> Text:
    return Text(text, mark.style) if styled else Text(f"{mark.left}{text}{mark.right}")


def _marked(
    text: str, marks: npt.NDArray[np.uint8], scale: Mapping[int, _Mark], styled: bool, *, keep_lines: bool
) -> Text:
    """Corpus text without interpretation of markup or control characters."""
    edges = np.flatnonzero(np.diff(marks)) + 1
    bounds = [0, *edges.tolist(), len(text)]
    runs = []
    for start, end in pairwise(bounds):
        run = printable(text[start:end], keep_lines=keep_lines)
        code = int(marks[start]) if start < end else _PLAIN
        runs.append(Text(run) if code == _PLAIN else _mark(run, scale[code], styled))
    return Text.assemble(*runs)


def _excerpt(
    text: str, marks: npt.NDArray[np.uint8], characters: int, scale: Mapping[int, _Mark], styled: bool
) -> Text:
    start, end = _window(text, marks, characters)
    shown = _marked(text[start:end], marks[start:end], scale, styled, keep_lines=False)
    return Text.assemble("…" if start else "", shown, "…" if end < len(text) else "")


def _window(text: str, marks: npt.NDArray[np.uint8], characters: int) -> tuple[int, int]:
    """The half-open range of an excerpt, cut at nearby whitespace."""
    first = int(np.argmax(marks != _PLAIN)) if len(marks) else 0
    start = 0
    if first >= characters // 2:
        lead = max(0, first - _LEAD)
        start = next((place + 1 for place in range(lead, first) if text[place].isspace()), first)
    end = start + characters
    if end >= len(text):
        return start, len(text)
    return start, next((place for place in range(end, max(start, end - _LEAD), -1) if text[place].isspace()), end)


def _legend(
    labels: str | None, codes: npt.NDArray[np.uint8], scale: Mapping[int, _Mark], color: Color, styled: bool
) -> Text:
    if color == "loss":
        steps = [_mark(step.meaning, step, styled) for step in scale.values()]
        return Text.assemble("Loss in nats: ", Text(", ").join([Text(f"below {LOSSES[0]:g}"), *steps]))
    if labels is None:
        return Text("No labels: lacy decide makes them")
    there = [_mark(label.meaning, label, styled) for code, label in scale.items() if code in codes]
    return Text.assemble(f"Labels {printable(labels)}: ", Text(", ").join([*there, Text("the rest is learned")]))


def _table(
    document: _Document, codes: npt.NDArray[np.uint8], scale: Mapping[int, _Mark], styled: bool
) -> Iterator[Text]:
    """A header and a line for each token. Columns that are empty for the whole document are left out."""
    tokens = document.tokens
    columns: list[tuple[str, list[str], bool]] = []  # name, cells, are numbers

    def add(name: str, values: Sequence[Any], form: Callable[[Any], str], *, numbers: bool = False) -> None:
        if any(value is not None for value in values):
            cells = ["" if value is None else form(value) for value in values]
            columns.append((printable(name), cells, numbers))

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    def column(name: str) -> list[Any]:
        return tokens[name].to_pylist()

    add("position", column("position"), str, numbers=True)
    texts = [_short(printable(token)) if token is not None else None for token in column("token")]
    add("token", texts, str)
    add("token_id", column("token_id"), str, numbers=True)
    for name, decided in document.labels.items():
        add(name, decided, str)
    add("factual", column("factual"), yes)
    for name in ("pos", "ent_type"):
        add(name, column(name), str)
    for name in ("ref_nll", "student_nll", "judge"):
        add(name, column(name), "{:.3f}".format, numbers=True)
    add("ref_correct", column("ref_correct"), yes)

    widths = [max(map(cell_len, [name, *cells])) for name, cells, _ in columns]

    def padded(cell: str, width: int, numbers: bool) -> str:
        space = " " * (width - cell_len(cell))
        return space + cell if numbers else cell + space

    header = "  ".join(padded(name, width, numbers) for (name, _, numbers), width in zip(columns, widths, strict=True))
    yield Text(header.rstrip(), "dim")
    for place, code in enumerate(codes.tolist()):
        line = Text()
        for (name, cells, numbers), width in zip(columns, widths, strict=True):
            cell = cells[place]
            if line:
                line.append("  ")
            if styled and name == "token" and code != _PLAIN:
                word = cell.lstrip()
                line.append(cell[: len(cell) - len(word)]).append(word, scale[code].style)
                line.append(" " * (width - cell_len(cell)))
            else:
                line.append(padded(cell, width, numbers))
        line.rstrip()
        yield line


def _short(token: str) -> str:
    return token if cell_len(token) <= _WIDEST else set_cell_size(token, _WIDEST - 1) + "…"
