import contextlib
import os

import duckdb
import pyarrow as pa
import pytest

from lacy.schemas import views
from lacy.schemas.errors import DatasetError, SqlError
from lacy.schemas.manifest import read_manifest, save, signals_path
from lacy.stats import connect as module
from lacy.stats.connect import connect, query, require_reading
from tests.stats.conftest import document, write


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "d", [document("a", "One goose, \x1b[31mtwo\x9b geese.\n\x00")])


def test_the_views_are_there(small):
    with connect(str(small)) as connection:
        names = connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    assert {name for (name,) in names} == set(views.NAMES)


def test_a_relative_path(small, monkeypatch):
    monkeypatch.chdir(small.parent)
    with connect("d") as connection:
        monkeypatch.chdir("/")
        assert connection.execute("SELECT count(*) FROM documents").fetchone() == (1,)


OUTSIDE = [  # d: the dataset; s: a file beside it
    "FROM read_text('{s}')",
    "FROM read_csv('{d}/../d2/secret.csv')",
    "FROM read_csv('dataset://../d2/secret.csv')",
    "FROM read_text('dataset://{s}')",
    "FROM read_text('dataset://signals/../link.csv')",
    "FROM read_text('{d}/link.csv')",
    "FROM read_text('{d}/manifest.json')",
    "FROM '{s}'",
    "FROM 'file://{s}'",
    "FROM '/proc/self/environ'",
    "FROM read_text('/proc/self/cwd/secret.csv')",
    "FROM sniff_csv('{s}')",
    "FROM read_json('{s}')",
    "FROM parquet_metadata('{s}')",
    "FROM parquet_schema('{d}/manifest.json')",
    "FROM read_blob(['dataset://manifest.json', '{s}'])",
    "FROM query('FROM read_text(''{s}'')')",
    "FROM query_table('{s}')",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{d}/out.csv''')",
    "CREATE MACRO m(path) AS TABLE FROM read_text(path); FROM m('{s}')",
    "PREPARE p AS FROM read_text('{s}'); EXECUTE p",
    "CREATE TABLE t (a VARCHAR); COPY t FROM '{s}'",
    "FROM glob('{d}/../*')",
    "FROM 'https://example.com/a.csv'",
    "FROM read_csv('http://127.0.0.1:1/a.csv')",
    "FROM 's3://bucket/a.parquet'",
    "SELECT getenv('HOME')",
    "ATTACH '{s}'",
    "IMPORT DATABASE '{d}/..'",
    "COPY (SELECT 1) TO '{d}/../out.csv'",
    "COPY (SELECT 1) TO '{d}/out.csv'",
    "COPY (SELECT 1) TO '{d}/manifest.json'",
    "COPY (SELECT 1) TO 'dataset://out.csv'",
    "COPY (SELECT 1) TO 'dataset://manifest.json'",
    "COPY (SELECT 1 AS a) TO 'dataset://signals/{part}.parquet' (FORMAT parquet, USE_TMP_FILE false)",
    "COPY (SELECT 1 AS a, 2 AS b) TO 'dataset://labels' (FORMAT parquet, PARTITION_BY a, OVERWRITE)",
    "COPY (SELECT 1 AS a, 2 AS b) TO '{d}' (FORMAT parquet, PARTITION_BY a, OVERWRITE)",
    "COPY (SELECT 1) TO '/dev/stdout'",
    "COPY /* a remark */ (SELECT 1) TO '{d}/out.csv'",
    "SELECT 1; COPY (SELECT 1) TO '{d}/out.csv'",
    "PREPARE p AS COPY (SELECT 1) TO '{d}/out.csv'; EXECUTE p",
    "WITH a AS (COPY (SELECT 1) TO '{d}/out.csv') FROM a",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{d}/out.csv'",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{s}'')'))",
    "FROM read_duckdb('{s}')",
    "FROM enable_logging(storage = 'file', storage_path = '{d}/out')",
    "FROM enable_profiling(save_location = '{d}/out')",
    "FROM duckdb_extensions()",
    "EXPORT DATABASE '{d}/out'",
    "EXPORT DATABASE 'dataset://out'",
    "ATTACH '{d}/out.db'",
    "ATTACH 'dataset://out.db'",
    "ATTACH 'dataset://manifest.json' AS m; CREATE TABLE m.t (a INTEGER)",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{d}/a.duckdb_extension'",
    "CREATE SECRET s (TYPE s3)",
    "CREATE PERSISTENT SECRET s (TYPE http)",
    "CALL enable_logging(storage = 'file', storage_config = {{'path': '{d}/out'}})",
    "SET enable_external_access = true",
    "SET GLOBAL enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET allowed_paths = ['{s}']",
    "RESET allowed_directories",
    "SET lock_configuration = false",
    "SET temp_directory = '/'",
    "SET profiling_output = '{d}/out'",
    "PRAGMA profiling_output = '{d}/out'",
    "PRAGMA enable_profiling = 'json'",
    "SET log_query_path = '{d}/out'",
    "SET home_directory = '{d}'",
]
SETTINGS = "SELECT name, value FROM duckdb_settings() WHERE name NOT LIKE '%progress%' ORDER BY name"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A dataset with a secret beside it, and a link to it among the files."""
    folder = tmp_path_factory.mktemp("guarded")
    dataset = write(folder / "d", [document("a", "One goose.")])
    (folder / "d2").mkdir()
    (folder / "d2" / "secret.csv").write_text("secret\n")
    (dataset / "link.csv").symlink_to(folder / "d2" / "secret.csv")
    return dataset


@pytest.mark.parametrize("sql", OUTSIDE)
def test_sql_reads_the_files_of_the_dataset_and_writes_none(guarded, sql, monkeypatch):
    """Whatever the statement, and without `require_reading`: the connection itself can reach nothing else."""
    secret = guarded.parent / "d2" / "secret.csv"
    monkeypatch.chdir(secret.parent)
    before = {path: path.stat().st_mtime_ns for path in guarded.parent.rglob("*")}
    part = next((guarded / "signals").iterdir()).stem
    rows = []
    with connect(guarded) as connection:
        settings = connection.execute(SETTINGS).fetchall()
        with contextlib.suppress(duckdb.Error):
            rows = connection.execute(sql.format(d=guarded, s=secret, part=part)).fetchall()
        assert connection.execute(SETTINGS).fetchall() == settings
        assert connection.execute("SELECT count(*) FROM duckdb_secrets()").fetchone() == (0,)
    assert rows == [], "neither an answer nor a row count"
    assert {path: path.stat().st_mtime_ns for path in guarded.parent.rglob("*")} == before


def test_what_the_dataset_has_can_be_read(guarded):
    with connect(guarded) as connection:
        assert connection.execute("SELECT count(*) FROM read_text('dataset://manifest.json')").fetchone() == (1,)
        found = connection.execute("FROM glob('dataset://*')").fetchall()
    files = {f"dataset://{path.relative_to(guarded).as_posix()}" for path in guarded.rglob("*.parquet")}
    assert len(files) == 3 and {name for (name,) in found} == files | {"dataset://manifest.json"}


def test_tables_in_memory_can_be_made(guarded):
    with connect(guarded) as connection:
        connection.execute("CREATE TEMP TABLE mine AS SELECT doc_id, count(*) AS n FROM tokens GROUP BY doc_id")
        connection.register("frame", pa.table({"doc_id": ["a"], "split": ["test"]}))
        found = connection.execute("SELECT n, split FROM mine JOIN frame USING (doc_id)").fetchall()
        assert found == connection.cursor().execute("SELECT tokens, 'test' FROM documents").fetchall()


def test_links_are_not_followed(tmp_path):
    doc = document("a", "One goose.")
    write(tmp_path / "d", [doc])
    file = signals_path(tmp_path / "d", doc.part)
    elsewhere = tmp_path / "signals" / file.name
    elsewhere.parent.mkdir()
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises((DatasetError, SqlError), match="is a link") as error:
        query(tmp_path / "d", "FROM documents")
    assert "\n" not in str(error.value)
    file.unlink()
    file.parent.rmdir()
    file.parent.symlink_to(elsewhere.parent)
    with pytest.raises(DatasetError, match="is a link out of the dataset"):
        connect(tmp_path / "d")


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    write(tmp_path / "other", [document("b", "Another goose.")])
    write(tmp_path / "d", [document("a", "One goose.")], sets={})
    manifest = read_manifest(tmp_path / "d")
    part = manifest.parts[0].model_copy(update={"name": f"../../other/signals/{manifest.parts[0].name}"})
    save(tmp_path / "d" / "manifest.json", manifest.model_copy(update={"parts": [part]}))
    with pytest.raises(DatasetError, match="is not a name of a part"):
        connect(tmp_path / "d")


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TEMP TABLE t AS SELECT 1",
        "create or replace temporary view v AS FROM tokens",
        "CREATE TEMP MACRO m(x) AS x + 1",
    ],
)
def test_a_session_may_make_temporary_things(small, sql):
    require_reading(sql, session=True)
    with pytest.raises(SqlError, match="CREATE is refused"):
        require_reading(sql)


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
        spill = connection.execute("SELECT current_setting('temp_directory')").fetchone()[0]
        connection.execute(f"EXPORT DATABASE '{spill}'")
        assert os.path.exists(spill)
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
        "EXPLAIN (ANALYZE, FORMAT json) FROM tokens",
        "EXPLAIN (FROM tokens)",
        "-- a remark\nSELECT 1",
        "PIVOT labels ON label IN ('learn', 'delegate') USING count(*) GROUP BY pos",
    ],
)
def test_statements_that_read_are_answered(small, sql):
    assert query(small, sql).num_rows > 0


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
    for session in (False, True):
        with pytest.raises(SqlError) as error:
            require_reading(sql.format(d=small), session)
        assert "\n" not in str(error.value) and str(error.value)
    with pytest.raises(SqlError):
        query(small, sql.format(d=small))
    assert sorted(os.listdir(small)) == before


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELEC 1", "syntax error"),
        ("INSTALL httpfs", "INSTALL is refused: a dataset is only read here"),
        ("use memory", "USE is refused"),
        ("WITH a AS (SELECT 1) INSERT INTO t FROM a", "INSERT is refused"),
        ("SELECT nothing FROM tokens", 'column "nothing" not found'),
        ("FROM nowhere", "nowhere does not exist"),
        ("SELECT doc_id::INTEGER FROM tokens", "Could not convert string 'a'"),
        ("FROM '/etc/passwd'", "/etc/passwd"),
    ],
)
def test_errors_are_one_line(small, sql, says):
    with pytest.raises(SqlError) as error:
        query(small, sql)
    assert says.lower() in str(error.value).lower() and "\n" not in str(error.value)
    assert "LINE 1" not in str(error.value)


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
