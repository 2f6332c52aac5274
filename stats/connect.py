"""DuckDB over a dataset: a database in memory with the views of `schemas.views`, and nothing else to reach."""

import csv
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Final, TextIO

import duckdb
import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from schemas.manifest import DatasetError
from schemas.views import create_views, quote
from stats.printable import printable

FORMATS: Final = ("table", "csv", "json")
TABLE_ROWS: Final = 100
_BATCH = 2048
_FILE_WIDTH = 240  # columns of a table in a file or a pipe
_BOUNDLESS = 1_000_000
_CELL = 1000  # characters


class SqlError(Exception):
    """A query that cannot be answered; one line that says why."""


class UsageError(Exception):
    """An argument that there is not; one line that says which there are."""


def connect(dataset: str | Path) -> duckdb.DuckDBPyConnection:
    """A connection with the views documents, tokens, labels and parts; their columns are in `schemas.views`.

    The database lies in memory and is locked. Prevented: reading or writing files outside the dataset (links that
    lead out of it too), the network, installing or loading extensions, reading Python variables by name, persistent
    secrets, and changing any of this. Not prevented: writing below the dataset (COPY TO and ATTACH may change it;
    `query` refuses both), and using up memory or time. A query larger than memory spills to the system's temporary
    folder.

    Raises DatasetError when `dataset` is missing, unfinished or damaged.
    """
    folder = Path(dataset)
    statements = create_views(folder)
    connection = duckdb.connect(
        config={
            "temp_directory": os.path.join(tempfile.gettempdir(), f"lacy-{uuid.uuid4().hex}"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_persistent_secrets": False,
            "python_enable_replacements": False,
        }
    )
    try:
        connection.execute(f"SET allowed_directories = [{quote(os.path.join(folder.resolve(), ''))}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        for statement in statements:
            connection.execute(statement)
    except duckdb.Error as error:
        connection.close()
        raise DatasetError(f"{dataset} cannot be read: {one_line(error)} (lacy check says what is damaged)") from None
    return connection


def query(dataset: str | Path, sql: str) -> pa.Table:
    """The rows that one reading statement gives: SELECT, FROM, WITH, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN.

    Raises SqlError for any other statement and for one that fails, DatasetError as `connect` does.
    """
    with connect(dataset) as connection:
        _require_reading(sql)
        try:
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise SqlError(one_line(error)) from None


def run(dataset: str | Path, sql: str, form: str, out: TextIO) -> None:
    """Write the answer to `sql` to `out`: "table" (its first rows), "csv" with a header, or "json", one object a line.

    Control characters of the corpus are never sent to a terminal; in a file or a pipe, csv and json hold what the
    corpus holds. Raises UsageError for another form, SqlError and DatasetError as `query` does.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form} is unknown: use {', '.join(FORMATS)}")
    with connect(dataset) as connection:
        _require_reading(sql)
        try:
            connection.execute(sql)
            columns = [column[0] for column in connection.description or ()]
            rows = _rows(connection)
            if columns == ["explain_key", "explain_value"]:
                out.writelines(f"{plan}\n" for _, plan in rows)
            elif form == "table":
                _write_table(columns, rows, out)
            elif form == "csv":
                _write_csv(columns, rows, out)
            else:
                _write_json(columns, rows, out)
        except duckdb.Error as error:
            raise SqlError(one_line(error)) from None


def _require_reading(sql: str) -> None:
    """Raises SqlError unless `sql` is one statement that reads.

    EXPLAIN ANALYZE runs what it explains, so that has to read, too.
    """
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise SqlError(one_line(error)) from None
    if len(statements) != 1:
        raise SqlError(f"{len(statements)} statements: give one")
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN:
        explained = re.sub(r"(?is)^\s*explain\s+(analy[sz]e\s+)?", "", statements[0].query, count=1)
        return _require_reading(explained)
    if kind != duckdb.StatementType.SELECT:
        raise SqlError(f"{kind.name} is refused: a dataset is only read here (SELECT, FROM, WITH, DESCRIBE, EXPLAIN)")


def _rows(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while batch := connection.fetchmany(_BATCH):
        yield from batch


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
    """The first rows, and a word about the others; a row below the other, a column a line, where they are too wide."""
    console = Console(file=out, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    shown = list(islice(rows, TABLE_ROWS))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        numbers = all(isinstance(row[place], int | float | Decimal | None) for row in shown)
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
        console.print(f"the first {TABLE_ROWS} rows; --format csv or json gives all")


def _cell(value: Any) -> Text:
    if value is None:
        return Text("NULL", style="dim")
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return Text(printable(text if len(text) <= _CELL else f"{text[:_CELL]}…"))


def one_line(error: duckdb.Error) -> str:
    """DuckDB's message without the excerpt of the query that follows it."""
    message = str(error).split("\n\nLINE ")[0]
    return " ".join(line.strip() for line in message.splitlines() if line.strip())
