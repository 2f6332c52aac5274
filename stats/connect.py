"""DuckDB over a dataset: a database in memory that can reach the views of `lacy.schemas.views` and nothing else."""

import os
import re
import shutil
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa

from lacy.schemas.errors import DatasetError, SqlError
from lacy.schemas.manifest import at
from lacy.schemas.views import PREFIX, create_views, quote
from lacy.stats.files import DatasetFiles

_REMOTE_THREADS: Final = 4  # for each core: what reads from an object store waits more than it computes
_EXPLAIN: Final = r"(?is)^\s*explain\b\s*(analy[sz]e\b|\(\s*(analy[sz]e|format)\b[^()]*\))?"
_SESSION: Final = r"(?is)create\s+(or\s+replace\s+)?(temp|temporary)\s+(recursive\s+)?(table|view|macro|function)\b"


def connect(dataset: str | os.PathLike[str]) -> duckdb.DuckDBPyConnection:
    """Connect to the views documents, tokens, labels and parts; `lacy.schemas.views` lists their columns.

    `dataset` is a folder or a URL (s3://, gs://, any that fsspec knows; credentials as s3fs and gcsfs find them).

    The database is in memory and locked. It can only read the files that the manifest lists (`lacy.stats.files`).
    No SQL can write to the dataset, read or write other files, follow links out of the dataset, reach the network,
    install or load extensions, store secrets, read Python variables by name, or change any of this. Tables and views
    that it creates are in memory. A query larger than memory spills to a folder of its own below the system's temporary
    folder, which is removed when the connection is closed. Not prevented: exhausting memory, time or that space, and
    whatever Python code does itself.

    Raises DatasetError when `dataset` is missing, unfinished or damaged.
    """
    root = at(dataset)
    local = isinstance(root, Path)
    try:
        views = create_views(root)
        files = DatasetFiles(root, views.files)
    except DatasetError:
        raise
    except PermissionError as error:
        raise DatasetError(str(error)) from None
    except Exception as error:
        if local:
            raise
        raise DatasetError(f"{dataset} cannot be read: {_last_line(str(error)) or type(error).__name__}") from None
    threads = {} if local else {"threads": _REMOTE_THREADS * (os.cpu_count() or 1)}
    spill = os.path.join(tempfile.gettempdir(), f"lacy-{uuid.uuid4().hex}")
    weakref.finalize(files, shutil.rmtree, spill, ignore_errors=True)  # the database holds them until it is closed
    connection = duckdb.connect(
        config={
            "temp_directory": spill,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_persistent_secrets": False,
            "python_enable_replacements": False,
            **threads,
        }
    )
    try:
        connection.register_filesystem(files)
        connection.execute(f"SET allowed_directories = [{quote(PREFIX)}]")
        connection.execute("SET parquet_metadata_cache = true")
        connection.execute("SET disable_parquet_prefetching = true")  # a megabyte for each list, however short
        connection.execute("SET enable_progress_bar = false")  # it would go to stdout, whatever that is
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        for statement in views.statements:
            connection.execute(statement)
    except duckdb.Error as error:
        connection.close()
        raise DatasetError(
            f"{dataset} cannot be read: {one_line(error)}: run lacy check {dataset} to list all damage"
        ) from None
    return connection


def query(dataset: str | os.PathLike[str], sql: str) -> pa.Table:
    """Run one reading statement and return its rows: SELECT, FROM, WITH, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN.

    Raises SqlError for any other statement and for one that fails, DatasetError as `connect` does.
    """
    with connect(dataset) as connection:
        require_reading(sql)
        try:
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise SqlError(one_line(error)) from None


def statements(sql: str) -> list[str]:
    """Split a text into statements. Raises SqlError when it is not SQL."""
    try:
        return [statement.query for statement in duckdb.extract_statements(sql)]
    except duckdb.Error as error:
        raise SqlError(one_line(error)) from None


def require_reading(sql: str, session: bool = False) -> None:
    """Raises SqlError unless `sql` is one statement that reads or, in a session, makes a temporary table or view.

    EXPLAIN ANALYZE runs what it explains, so that has to read, too.
    """
    try:
        found = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise SqlError(one_line(error)) from None
    if len(found) != 1:
        raise SqlError(f"{len(found)} statements: pass only one")
    kind = found[0].type
    if kind == duckdb.StatementType.EXPLAIN:
        explained = re.sub(_EXPLAIN, "", found[0].query, count=1)
        return require_reading(explained)
    if session and kind == duckdb.StatementType.CREATE and re.match(_SESSION, found[0].query.strip()):
        return None
    if kind != duckdb.StatementType.SELECT:
        word = re.match(r"(?i)(install|use)\b", found[0].query.strip())  # to DuckDB a LOAD and a SET
        name = word[0].upper() if word else kind.name
        raise SqlError(f"{name} is refused: a dataset is only read here (SELECT, FROM, WITH, DESCRIBE, EXPLAIN)")
    return None


def one_line(error: Exception) -> str:
    """DuckDB's message without the excerpt of the query; for a traceback, the exception that was raised."""
    message = str(error).split("\n\nLINE ")[0]
    if "Traceback (most recent call last)" in message:
        return _last_line(message)
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return re.sub(
        r"^(lacy\.schemas\.errors\.DatasetError|OSError|FileNotFoundError|PermissionError): ",
        "",
        lines[-1] if lines else "",
    )
