"""Datasets in an object store: a real S3 server on this machine, and a store in memory."""

import io
import subprocess
import uuid

import duckdb
import fsspec
import pytest
from rich.console import Console

import lacy
from lacy.schemas.errors import DatasetError
from lacy.schemas.manifest import at, signals_path
from lacy.schemas.remote import RemoteFile
from lacy.stats import report, show
from lacy.stats.connect import connect
from tests.conftest import LACY
from tests.stats.conftest import document, write

QUERIES = [
    "SELECT count(*), sum(ref_nll), count(DISTINCT word) FROM tokens",
    "SELECT labels, label, pos, count(*), min(token) FROM labels GROUP BY ALL ORDER BY ALL",
    "SELECT doc_id, text, factual_tokens FROM documents ORDER BY doc_id",
    "FROM parts ORDER BY part",
    "SELECT position, token FROM tokens WHERE doc_id = (SELECT max(doc_id) FROM documents) ORDER BY position",
]


@pytest.fixture(scope="module")
def s3():
    """A bucket's URL; what reads it finds the server by the usual variables."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def put(request):
    """Copies a dataset to a store, and gives its URL."""

    def copy(dataset, kind):
        root = request.getfixturevalue("s3") if kind == "s3" else "memory://stored"
        url = f"{root}/{uuid.uuid4().hex}/d"
        store, path = fsspec.url_to_fs(url)
        for file in dataset.rglob("*.*"):
            store.pipe_file(f"{path}/{file.relative_to(dataset).as_posix()}", file.read_bytes())
        return url

    return copy


@pytest.fixture
def fetched(monkeypatch):
    """The requests that queries make: the name of the file, and the bytes."""
    requests = []
    fetch = RemoteFile._fetch

    def counting(self, begin, end):
        fetch(self, begin, end)
        requests.append((self._name, len(self._window)))

    monkeypatch.setattr(RemoteFile, "_fetch", counting)
    return requests


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_answers_are_those_of_the_folder(dataset, put, kind):
    url = put(dataset, kind)
    with connect(dataset) as here, lacy.connect(url) as there:
        for sql in QUERIES:
            rows = there.execute(sql).fetchall()
            assert rows and rows == here.execute(sql).fetchall()


@pytest.mark.parametrize("kind", ["bare", "empty"])
def test_what_is_left_out(put, kind, request):
    url = put(request.getfixturevalue(kind), "s3")
    with connect(url) as connection:
        assert connection.execute("FROM labels").fetchall() == []
        connection.execute("SELECT count(word), sum(judge) FROM tokens").fetchall()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four parts of about 300 KB, most of it text and losses."""
    words = [f"{uuid.uuid5(uuid.NAMESPACE_DNS, str(n)).hex} " for n in range(4000)]
    documents = [document(f"doc {n}", "".join(words[n:])) for n in range(4)]
    return write(tmp_path_factory.mktemp("large") / "d", documents, per_part=1), documents


def test_a_query_fetches_the_columns_that_it_names(large, put, fetched):
    dataset, _ = large
    size = sum(file.stat().st_size for file in (dataset / "signals").iterdir())
    assert size > 1_000_000
    with connect(put(dataset, "s3")) as connection:
        before = sum(count for _, count in fetched)
        connection.execute("SELECT count_if(factual) FROM tokens").fetchall()
        factual = sum(count for _, count in fetched)
        connection.execute("SELECT sum(length(text)) FROM documents").fetchall()
        text = sum(count for _, count in fetched)
    assert before < 0.1 * size, "the views take footers"
    assert factual < 0.25 * size < text < 0.8 * size


def test_a_query_fetches_the_parts_that_it_names(large, put, fetched):
    dataset, documents = large
    part = documents[2].part
    with connect(put(dataset, "s3")) as connection:
        fetched.clear()
        sql = "SELECT count(*), sum(ref_nll) FROM labels WHERE part = ? AND labels = 'lacy'"
        ((count, _),) = connection.execute(sql, [part]).fetchall()
    assert count == len(documents[2].spans)
    names = {path.split("/d/")[1] for path, _ in fetched}
    assert names <= {f"signals/{part}.parquet", f"labels/lacy/{part}.parquet"} and len(names) == 2


def test_one_document_does_not_fetch_the_others(large, put, fetched):
    dataset, documents = large
    size = sum(file.stat().st_size for file in (dataset / "signals").iterdir())
    with connect(put(dataset, "s3")) as connection:
        fetched.clear()
        sql = "SELECT token FROM tokens WHERE doc_id = 'doc 2' ORDER BY position"
        tokens = [token for (token,) in connection.execute(sql).fetchall()]
    assert "".join(tokens) == documents[2].text
    assert sum(count for _, count in fetched) < 0.45 * size, "a quarter of it, and of the others the ids"


def test_the_store_is_only_read(dataset, put):
    url = put(dataset, "s3")
    store, path = fsspec.url_to_fs(url)
    before = store.find(path, detail=True)
    with connect(url) as connection:
        for sql in (
            "COPY (SELECT 1) TO 'dataset://x.csv'",
            "COPY (SELECT 1) TO 'dataset://manifest.json'",
            f"COPY (SELECT 1) TO '{url}/x.csv'",
            f"FROM read_text('{url}/manifest.json')",
            f"ATTACH '{url}/x.db'",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(sql)
    store.invalidate_cache()
    assert store.find(path, detail=True) == before


def test_the_command(dataset, put):
    done = subprocess.run(
        [LACY, "sql", put(dataset, "s3"), "SELECT count(*) AS n FROM documents", "--format", "csv"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "n\n24\n", "")


def test_what_is_looked_at_is_that_of_the_folder(dataset, documents, put, tmp_path):
    url = put(dataset, "s3")
    for place, found in enumerate((dataset, url)):
        report.write(found, tmp_path / f"{place}.html", where="source LIKE '%:2'", labels="lacy")
        out = io.StringIO()
        show.show(found, documents[3].doc_id, console=Console(file=out, width=100))
        (tmp_path / f"{place}.txt").write_text(out.getvalue())
    assert (tmp_path / "0.html").read_bytes() == (tmp_path / "1.html").read_bytes()
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text() != ""
    with pytest.raises(DatasetError, match="no document 'x'"):
        report.write(url, tmp_path / "x.html", documents=["x"])


def test_what_is_missing_is_one_line(s3, put, tmp_path):
    doc = document("a", "One goose.")
    dataset = write(tmp_path / "d", [doc], sets={})
    for url in (f"{s3}/nothing", "s3://no-such-bucket/d", "memory://nothing"):
        with pytest.raises(DatasetError, match=r"manifest\.json|cannot be read") as error:
            connect(url)
        assert "\n" not in str(error.value)
    signals_path(dataset, doc.part).unlink()
    (dataset / "signals" / "other.parquet").touch()
    with pytest.raises(DatasetError, match="missing or damaged: run lacy check"):
        connect(put(dataset, "s3"))


def test_paths_and_urls(tmp_path):
    assert at(str(tmp_path)) == at(tmp_path) == at(f"file://{tmp_path}") == tmp_path
    assert str(at("s3://bucket/d") / "manifest.json") == "s3://bucket/d/manifest.json"
    assert at(at("memory://d")) == at("memory://d")
    with pytest.raises(DatasetError, match="this kind of URL is not supported"):
        at("gopher://d")


def test_a_missing_package_is_named():
    with pytest.raises(DatasetError, match="pip install adlfs"):
        at("az://bucket/d")
