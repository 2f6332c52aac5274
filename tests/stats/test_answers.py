import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lacy.schemas.errors import SqlError, UsageError
from lacy.stats import answers
from lacy.stats.answers import destination
from lacy.stats.connect import connect
from tests.conftest import LACY
from tests.stats.conftest import document, write


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "d", [document("a", "One goose, \x1b[31mtwo\x9b geese.\n\x00")])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def answer(dataset, sql, form, out=None):
    if out is None:
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    with connect(dataset) as connection:
        answers.answer(connection, sql, form, out)
    out.flush()
    return out.getvalue() if isinstance(out, io.StringIO) else out.buffer.getvalue().decode("utf-8")


def to_file(dataset, sql, form, path):
    with connect(dataset) as connection, destination(path, dataset) as out:
        answers.answer(connection, sql, form, out)


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


@pytest.mark.parametrize("form", answers.FORMATS[:3])
def test_a_terminal_gets_no_control_characters(small, form):
    out = answer(small, 'SELECT text, text AS "\x1b[2J" FROM documents', form, Terminal())
    assert "goose" in out
    assert not {"\x00", "\x9b"} & set(out) and "\x1b[31m" not in out and "\x1b[2J" not in out


def test_a_table_shows_the_first_rows(small):
    out = answer(small, f"SELECT range AS n, NULL AS nothing FROM range({answers.TABLE_ROWS + 1})", "table")
    assert f"the first {answers.TABLE_ROWS} rows" in out and "NULL" in out
    assert f" {answers.TABLE_ROWS - 1} " in out and f" {answers.TABLE_ROWS} " not in out.split("the first")[0]
    assert "the first" not in answer(small, f"FROM range({answers.TABLE_ROWS})", "table")


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


def test_columns_of_one_name_are_told_apart(small, tmp_path):
    sql = "SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a"
    assert json.loads(answer(small, sql, "json")) == {"a": 1, "a_1": 2, "a_1_1": 3, "a_2": 4}
    to_file(small, sql, "parquet", tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == [{"a": 1, "a_1": 2, "a_1_1": 3, "a_2": 4}]


def test_an_unknown_format(small):
    with pytest.raises(UsageError, match="--format xml is unknown: use table, csv, json, parquet"):
        answer(small, "SELECT 1", "xml")


@pytest.mark.parametrize("sql", ["DROP VIEW tokens", "COPY (SELECT 1) TO 'x.csv'", "CREATE TEMP TABLE t AS SELECT 1"])
def test_what_does_not_read_is_refused(small, sql):
    with pytest.raises(SqlError, match="is refused: a dataset is only read here"):
        answer(small, sql, "table")


def test_parquet_holds_the_types_and_the_rows(small, tmp_path):
    sql = "SELECT doc_id, position, token, ref_nll, factual, [1, NULL] AS l FROM tokens ORDER BY position"
    to_file(small, sql, "parquet", tmp_path / "new" / "out.parquet")
    found = pq.read_table(tmp_path / "new" / "out.parquet")
    with connect(small) as connection:
        expected = connection.sql(sql).to_arrow_table()
    assert found.to_pylist() == expected.to_pylist() and found.num_rows > 5
    assert str(found.schema.field("ref_nll").type) == "float" and str(found.schema.field("factual").type) == "bool"


def test_parquet_is_not_for_a_terminal(small):
    with pytest.raises(UsageError, match="pass --out FILE"):
        answer(small, "SELECT 1", "parquet", Terminal())


def test_what_parquet_cannot_hold_is_one_line(small, tmp_path):
    with pytest.raises(SqlError, match="Parquet cannot hold this answer") as error:
        to_file(small, "SELECT INTERVAL 1 MONTH AS i", "parquet", tmp_path / "out.parquet")
    assert "\n" not in str(error.value) and not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("form", answers.FORMATS)
def test_a_file_is_whole_or_not_there(small, tmp_path, form):
    out = tmp_path / "out"
    out.write_text("before")
    late = "SELECT CASE WHEN range = 99999 THEN 'x' ELSE '1' END::INTEGER AS n FROM range(100000)"
    if form != "table":  # which reads its first rows alone
        with pytest.raises(SqlError, match="Could not convert string 'x'"):
            to_file(small, late, form, out)
        assert out.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["d", "out"]
    to_file(small, "SELECT 1 AS n", form, out)
    assert b"before" not in out.read_bytes() and sorted(os.listdir(tmp_path)) == ["d", "out"]


def test_nothing_is_written_into_the_dataset(small, tmp_path):
    (tmp_path / "link").symlink_to(small / "signals")
    for out in (small / "manifest.json", small / "new", tmp_path / "link" / "new"):
        with pytest.raises(UsageError, match="is in the dataset"):
            to_file(small, "SELECT 1", "csv", out)
    assert not (small / "new").exists()


def test_where_no_file_can_be_is_said_at_once(small, tmp_path):
    (tmp_path / "file").touch()
    for out, says in ((tmp_path, "is a folder: pass a file in it"), (tmp_path / "file" / "x", "file is not a folder")):
        with pytest.raises(UsageError, match=says):
            to_file(small, "SELECT 1", "csv", out)


def test_a_device_is_written_to_and_not_replaced(small, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    to_file(small, "SELECT 1 AS n", "csv", fifo)
    assert os.read(reader, 100) == b"n\n1\n" and not fifo.is_file()
    os.close(reader)


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_rows_are_not_held_in_memory(small, form):
    many = "SELECT range AS n, repeat(md5(range::VARCHAR), 300) AS text FROM range(30000)"  # 290 MB
    script = f"""
import resource
from pathlib import Path
from lacy.stats.answers import answer, destination
from lacy.stats.connect import connect
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with connect({str(small)!r}) as connection, destination(Path("/dev/null"), Path({str(small)!r})) as out:
    answer(connection, {many!r}, {form!r}, out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 220, "MB"


def lacy(*arguments, given=""):
    return subprocess.run([LACY, *arguments], input=given.encode(), capture_output=True, timeout=60)


def test_the_command_answers_a_query_and_what_it_is_given(small):
    done = lacy("sql", small, "SELECT count(*) AS n FROM documents", "--format", "csv")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"n\n1\n", b"")
    given = "SELECT 1 AS a; CREATE TEMP TABLE t AS SELECT 2 AS b;\n-- a remark; and more\nFROM t; SELECT ';' AS c"
    done = lacy("sql", small, "--format", "json", given=given)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if "Count" not in line] == [{"a": 1}, {"b": 2}, {"c": ";"}]


def test_the_command_writes_parquet(small, tmp_path):
    done = lacy("sql", small, "FROM tokens", "--format", "parquet")
    (tmp_path / "piped.parquet").write_bytes(done.stdout)
    assert lacy("sql", small, "FROM tokens", "--format", "parquet", "--out", tmp_path / "o.parquet").returncode == 0
    tables = [pq.read_table(tmp_path / name) for name in ("piped.parquet", "o.parquet")]
    assert tables[0].equals(tables[1]) and tables[0].num_rows > 5


def test_what_goes_wrong_is_one_line(small, tmp_path):
    cases = [
        ((small, "SELEC 1"), 2, "syntax error"),
        ((small, "FROM tokens", "--format", "xml"), 2, "--format: 'xml' is not one of 'table'"),
        ((small, "COPY (SELECT 1) TO 'x'"), 2, "COPY is refused"),
        ((tmp_path / "no",), 2, "has no manifest.json"),
        ((small, "FROM tokens", "--out", small / "x.csv"), 2, "is in the dataset"),
        (("gopher://x/y", "SELECT 1"), 2, "this kind of URL is not supported"),
    ]
    for arguments, code, says in cases:
        done = lacy("sql", *arguments)
        assert done.returncode == code and done.stdout == b"", done.stderr
        assert done.stderr.startswith(b"lacy: ") and done.stderr.count(b"\n") == 1 and says in done.stderr.decode()
    done = lacy("sql", small, "--out", tmp_path / "x.csv", given="SELECT 1; SELECT 2")
    assert done.returncode == 2 and b"2 statements: pass only one with --out" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(small):
    command = f"{LACY} sql '{small}' 'SELECT range AS n FROM range(300000)' --format csv | head -n 2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert done.stdout == b"n\n0\n" and done.stderr == b""
