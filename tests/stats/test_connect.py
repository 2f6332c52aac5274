import csv
import io
import json
import os
import re

import duckdb
import pytest

from schemas import views
from schemas.manifest import DatasetError, signals_path
from stats import connect as module
from stats.connect import SqlError, UsageError, connect, query, run
from tests.stats.conftest import document, write


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "d", [document("a", "One goose, \x1b[31mtwo\x9b geese.\n\x00")])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def answer(dataset, sql, form, out=None):
    out = out or io.StringIO()
    run(dataset, sql, form, out)
    return out.getvalue()


def test_the_views_are_there(small):
    with connect(str(small)) as connection:
        names = connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    assert {name for (name,) in names} == set(views.NAMES)


def test_a_relative_path(small, monkeypatch):
    monkeypatch.chdir(small.parent)
    with connect("d") as connection:
        monkeypatch.chdir("/")
        assert connection.execute("SELECT count(*) FROM documents").fetchone() == (1,)


def test_files_outside_the_dataset_cannot_be_read_or_written(small, tmp_path):
    (tmp_path / "d2").mkdir()
    secret = tmp_path / "d2" / "secret.csv"
    secret.write_text("secret\n")
    (small / "link.csv").symlink_to(secret)
    with connect(small) as connection:
        for statement in (
            f"FROM read_text('{secret}')",
            f"FROM read_csv('{small}/../d2/secret.csv')",
            f"FROM read_text('{small}/link.csv')",
            f"FROM '{secret}'",
            f"FROM glob('{tmp_path}/*')",
            f"COPY (SELECT 1) TO '{tmp_path}/out.csv'",
            f"ATTACH '{tmp_path}/other.db'",
            "FROM 'https://example.com/a.csv'",
            "INSTALL httpfs",
            "LOAD httpfs",
            "CREATE PERSISTENT SECRET s (TYPE http)",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(statement)
        assert connection.execute(f"SELECT count(*) FROM read_text('{small}/manifest.json')").fetchone() == (1,)
    assert sorted(os.listdir(tmp_path)) == ["d", "d2"]


def test_the_lock_cannot_be_opened(small):
    with connect(small) as connection:
        for statement in (
            "SET enable_external_access = true",
            "SET allowed_directories = ['/']",
            "RESET allowed_directories",
            "SET lock_configuration = false",
            "SET temp_directory = '/'",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(statement)


def test_python_variables_are_not_tables(small):
    secret = query(small, "SELECT 1 AS one")
    assert secret.num_rows == 1
    with connect(small) as connection, pytest.raises(duckdb.Error, match="does not exist"):
        connection.execute("FROM secret")


def test_what_spills_goes_to_the_temporary_folder(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path / "spill"))
    (tmp_path / "spill").mkdir()
    with connect(small) as connection:
        assert connection.execute("SELECT current_setting('temp_directory')").fetchone()[0].startswith(str(tmp_path))
        connection.execute("SELECT count(*) FROM (SELECT range AS n FROM range(1000) ORDER BY hash(n))").fetchall()
    assert os.listdir(tmp_path / "spill") == []


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT doc_id FROM documents",
        "FROM tokens",
        "WITH a AS (SELECT 1 AS n) SELECT n FROM a;",
        "DESCRIBE labels",
        "SUMMARIZE parts",
        "SHOW TABLES",
        "EXPLAIN SELECT 1",
        "explain analyze FROM tokens",
        "-- a remark\nSELECT 1",
        "PIVOT labels ON label IN ('learn', 'delegate') USING count(*) GROUP BY pos",
    ],
)
@pytest.mark.parametrize("form", module.FORMATS)
def test_statements_that_read_are_answered(small, sql, form):
    assert query(small, sql).num_rows > 0
    assert answer(small, sql, form)


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{d}/out.csv'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{d}/out.csv'",
        "EXPLAIN /* */ ANALYZE COPY (SELECT 1) TO '{d}/out.csv'",
        "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{d}/out.csv'",
        "ATTACH '{d}/out.db'",
        "EXPORT DATABASE '{d}/out'",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW tokens",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "SET threads = 1",
        "SELECT 1; COPY (SELECT 1) TO '{d}/out.csv'",
        "SELECT 1; SELECT 2",
        "",
        "-- nothing",
    ],
)
def test_other_statements_are_refused(small, sql):
    before = sorted(os.listdir(small))
    for ask in (query, lambda *args: run(*args, "table", io.StringIO())):
        with pytest.raises(SqlError) as error:
            ask(small, sql.format(d=small))
        assert "\n" not in str(error.value) and str(error.value)
    assert sorted(os.listdir(small)) == before


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT nothing FROM tokens", 'column "nothing" not found'),
        ("FROM nowhere", "nowhere does not exist"),
        ("SELECT doc_id::INTEGER FROM tokens", "Could not convert string 'a'"),
        ("FROM '/etc/passwd'", "/etc/passwd"),
    ],
)
def test_errors_are_one_line(small, sql, says):
    for ask in (query, lambda *args: run(*args, "csv", io.StringIO())):
        with pytest.raises(SqlError) as error:
            ask(small, sql)
        assert says.lower() in str(error.value).lower() and "\n" not in str(error.value)
        assert "LINE 1" not in str(error.value)


def test_csv_holds_what_the_corpus_holds(small):
    out = answer(small, "SELECT doc_id, text, NULL AS nothing, 1.5 AS n FROM documents", "csv")
    assert list(csv.reader(io.StringIO(out.replace("\x00", "0")))) == [
        ["doc_id", "text", "nothing", "n"],
        ["a", "One goose, \x1b[31mtwo\x9b geese.\n0", "", "1.5"],
    ]


def test_json_is_one_object_a_line(small):
    sql = "SELECT position, token, ref_nll, [1, NULL] AS l, sum(1) OVER () AS h, DATE '2020-01-02' AS d FROM tokens"
    lines = [json.loads(line) for line in answer(small, sql, "json").splitlines()]
    assert lines[0] == {
        "position": 0,
        "token": "One",
        "ref_nll": None,
        "l": [1, None],
        "h": len(lines),
        "d": "2020-01-02",
    }
    assert "".join(line["token"] for line in lines) == "One goose, \x1b[31mtwo\x9b geese.\n\x00"


@pytest.mark.parametrize("form", module.FORMATS)
def test_a_terminal_gets_no_control_characters(small, form):
    out = answer(small, 'SELECT text, text AS "\x1b[2J" FROM documents', form, Terminal())
    assert "goose" in out
    assert not {"\x00", "\x9b"} & set(out) and "\x1b[31m" not in out and "\x1b[2J" not in out


def test_a_table_shows_the_first_rows(small):
    out = answer(small, f"SELECT range AS n, NULL AS nothing FROM range({module.TABLE_ROWS + 1})", "table")
    assert f"the first {module.TABLE_ROWS} rows" in out and "NULL" in out
    assert f" {module.TABLE_ROWS - 1} " in out and f" {module.TABLE_ROWS} " not in out.split("the first")[0]
    assert "the first" not in answer(small, f"FROM range({module.TABLE_ROWS})", "table")


def test_a_table_too_wide_for_its_place_becomes_a_list(small, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    sql = f"SELECT 1 AS n, '{'x' * 50}' AS wide, NULL AS nothing"
    assert answer(small, sql, "table").splitlines()[1].split() == ["n", "wide", "nothing"], "a file has room"
    lines = re.sub(r"\x1b\[\d*m", "", answer(small, sql, "table", Terminal())).splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ") and line] == ["n", "wide", "nothing"]
    assert max(map(len, lines)) <= 40 and "".join(lines).count("x") == 50


def test_long_cells_are_cut(small):
    out = answer(small, "SELECT repeat('y', 1001) AS x", "table")
    assert out.count("y") == 1000 and "…" in out


def test_table_cells_are_no_markup(small):
    assert "[red]x[/red]" in answer(small, "SELECT '[red]x[/red]' AS \"[b]\"", "table")


def test_an_unknown_format(small):
    with pytest.raises(UsageError, match="--format xml is unknown: use table, csv, json"):
        run(small, "SELECT 1", "xml", io.StringIO())


def test_no_dataset(tmp_path, small):
    with pytest.raises(DatasetError, match="has no manifest"):
        connect(tmp_path / "nowhere")
    running = write(tmp_path / "running", [document("a", "One goose.")], state="running")
    with pytest.raises(DatasetError, match="not finished"):
        connect(running)


def test_a_damaged_part_is_a_clear_error(tmp_path):
    docs = [document("a", "One goose."), document("b", "Two geese.")]
    write(tmp_path, docs, per_part=1)
    assert docs[0].part != docs[1].part
    for file in (signals_path(tmp_path, docs[1].part), signals_path(tmp_path, docs[0].part)):
        file.write_bytes(b"PAR1 no parquet")
        with pytest.raises((DatasetError, SqlError)) as error:
            query(tmp_path, "SELECT sum(ref_nll) FROM tokens")
        assert "\n" not in str(error.value) and file.name in str(error.value)
