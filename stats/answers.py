"""The answer to a query as a table, CSV, JSON or Parquet, written while DuckDB computes it."""

import csv
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final, TextIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lacy.schemas.errors import SqlError, UsageError
from lacy.schemas.files import open_atomic
from lacy.schemas.printable import printable
from lacy.stats.connect import one_line, require_reading

FORMATS: Final = ("table", "csv", "json", "parquet")
TABLE_ROWS: Final = 100
_BATCH = 2048
_ROW_GROUP = 1 << 26  # bytes, uncompressed
_FILE_WIDTH = 240  # columns of a table in a file or a pipe
_BOUNDLESS = 1_000_000
_CELL = 1000  # characters


def require_format(form: str) -> None:
    if form not in FORMATS:
        raise UsageError(f"--format {form} is unknown: use {', '.join(FORMATS)}")


def answer(connection: duckdb.DuckDBPyConnection, sql: str, form: str, out: TextIO, *, session: bool = False) -> None:
    """Write the answer to one statement to `out`.

    "table" shows the first rows, "csv" has a header, "json" is one object a line, "parquet" goes to the bytes below
    `out`. The rows are written as they come, not held in memory. Control characters of the corpus are never sent to a
    terminal; in a file or a pipe, csv, json and parquet hold what the corpus holds.

    Ctrl-C stops the query and raises KeyboardInterrupt; the connection can still be used.

    `session`: the statement may also make a temporary table or view. Raises UsageError for another form or for
    Parquet on a terminal, SqlError for a statement that is refused or fails.
    """
    require_format(form)
    require_reading(sql, session)
    if form == "parquet" and out.isatty():
        raise UsageError("--format parquet cannot be shown on a terminal: pass --out FILE, or redirect it")
    with ThreadPoolExecutor(1) as worker:
        running = worker.submit(_answer, connection, sql, form, out)
        try:
            running.result()
        except KeyboardInterrupt:  # which DuckDB does not hear
            connection.interrupt()
            raise
        except duckdb.Error as error:
            raise SqlError(one_line(error)) from None


def _answer(connection: duckdb.DuckDBPyConnection, sql: str, form: str, out: TextIO) -> None:
    if form == "parquet":
        _write_parquet(connection.sql(sql), out)
        return
    connection.execute(sql)
    columns = _unique([column[0] for column in connection.description or ()])
    if not columns:
        return
    rows = _rows(connection)
    if columns == ["explain_key", "explain_value"]:
        out.writelines(f"{plan}\n" for _, plan in rows)
    elif form == "table":
        _write_table(columns, rows, out)
    elif form == "csv":
        _write_csv(columns, rows, out)
    else:
        _write_json(columns, rows, out)


def require_place(out: Path, dataset: Path) -> None:
    """Raises UsageError for a path that cannot be written, or that lies in the dataset, which is read-only here."""
    if isinstance(dataset, Path) and out.resolve().is_relative_to(dataset.resolve()):
        raise UsageError(f"--out {out} is in the dataset, which is only read here: write beside it")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: pass a file in it")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"--out {out} cannot be written: {folder} is {'read-only' if folder.is_dir() else 'not a folder'}"
        )


@contextmanager
def destination(path: Path | None, dataset: Path) -> Iterator[TextIO]:
    """Open the destination of an answer: stdout, or a file that appears when it is complete.

    Raises UsageError as `require_place` does.
    """
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    require_place(path, dataset)
    special = path.exists() and not stat.S_ISREG(path.stat().st_mode)  # a pipe, /dev/null
    with open(path, "wb") if special else open_atomic(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        yield text
        text.flush()
        text.detach()


def _unique(names: list[str]) -> list[str]:
    """Number repeated names of columns, which objects and files need to be unique."""
    found: list[str] = []
    for name in names:
        number, new = 0, name
        while new in found:
            number += 1
            new = f"{name}_{number}"
        found.append(new)
    return found


def _rows(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while batch := connection.fetchmany(_BATCH):
        yield from batch


class _Sink(io.RawIOBase):
    """A writer to a pipe that counts its bytes, as a pipe cannot."""

    def __init__(self, out: BinaryIO):
        self._out, self._written = out, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._out.write(data)
        self._written += len(data)
        return len(data)

    def tell(self) -> int:
        return self._written


def _write_parquet(found: duckdb.DuckDBPyRelation, out: TextIO) -> None:
    reader = found.to_arrow_reader(_BATCH)
    schema = pa.schema([f.with_name(name) for f, name in zip(reader.schema, _unique(reader.schema.names), strict=True)])
    try:
        with pq.ParquetWriter(_Sink(out.buffer), schema, compression="zstd") as writer:
            waiting: list[pa.RecordBatch] = []
            for batch in reader:
                waiting.append(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
                if sum(part.nbytes for part in waiting) >= _ROW_GROUP:
                    writer.write_table(pa.Table.from_batches(waiting))
                    waiting.clear()
            writer.write_table(pa.Table.from_batches(waiting, schema))
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SqlError(f"Parquet cannot hold this answer, cast its columns: {str(error).splitlines()[0]}") from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) or "Error" not in str(error):
            raise
        raise SqlError(one_line(error)) from None


def _write_csv(columns: list[str], rows: Iterator[tuple[Any, ...]], out: TextIO) -> None:
    show = printable if out.isatty() else str
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(show, columns))
    for row in rows:
        writer.writerow(show(str(value)) if value is not None else None for value in row)


def _write_json(columns: list[str], rows: Iterator[tuple[Any, ...]], out: TextIO) -> None:
    show = printable if out.isatty() else str
    for row in rows:
        line = json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False, default=str)
        out.write(show(line) + "\n")


def _write_table(columns: list[str], rows: Iterator[tuple[Any, ...]], out: TextIO) -> None:
    """Write the first rows and note any others. Rows that are too wide are written one column a line."""
    console = Console(file=out, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    shown = list(islice(rows, TABLE_ROWS))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], int | float | Decimal | None) for row in shown)
        table.add_column(Text(printable(column)), justify="right" if numbers else "left", overflow="fold")
    for row in shown:
        table.add_row(*map(_cell, row))
    if (
        len(columns) == 1
        or console.measure(table, options=console.options.update(max_width=_BOUNDLESS)).maximum <= console.width
    ):
        console.print(table)
    else:
        for row in shown:
            record = Table.grid("", Column(overflow="fold"), padding=(0, 2))
            for column, value in zip(columns, row, strict=True):
                record.add_row(Text(printable(column), style="dim"), _cell(value))
            console.print(record, "")
    if next(rows, None) is not None:
        console.print(f"the first {TABLE_ROWS} rows; --format csv, json or parquet gives all")


def _cell(value: Any) -> Text:
    if value is None:
        return Text("NULL", style="dim")
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return Text(printable(text if len(text) <= _CELL else f"{text[:_CELL]}…"))
