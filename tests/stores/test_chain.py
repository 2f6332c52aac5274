"""Everything from corpus to training in a store, by the real commands, while every so many requests go wrong.

What is written must be what a local run writes, byte for byte but for the corpus's paths, and nothing else may be left.
"""

import json
import subprocess
import time
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.parts import to_parquet
from tests.conftest import LACY
from tests.forks import LABEL, Forks
from tests.pipeline import corpora
from tests.stores.conftest import SERVERS
from tests.stores.proxy import KINDS

PART_BYTES = 4096
TRAIN = ("trainer.train", "torch._dynamo", "transformers.models.gpt2.modeling_gpt2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files, one of them a stream, and what is bad in them."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = corpora.documents(30, seed=1)
    corpora.write(folder / "a.jsonl", rows)
    corpora.write(folder / "b.jsonl.gz", [*corpora.documents(25, seed=2), rows[3], {"id": "x", "text": 7}])
    corpora.write(folder / "c.parquet", corpora.documents(10, seed=3))
    return folder


def label(corpus, out, model, *more):
    return ["label", corpus, "--out", out, "--reference", model, "--part-bytes", PART_BYTES, "--workers", 1, *more]


@pytest.fixture(scope="module")
def local(corpus, small_model, tmp_path_factory, labeller):
    out = tmp_path_factory.mktemp("labelled") / "d"
    done = labeller(*label(corpus, out, small_model))
    assert done.returncode == 0, done.stderr
    done = labeller("decide", out, "--policy", "loss", "--budget", 0.2)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module", params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def chain(request, corpus, small_model, tmp_path_factory):
    """A store with corpus and model in it, what runs commands, and the folder that models are fetched to."""
    folder = tmp_path_factory.mktemp("forks")
    with SERVERS[request.param]() as store, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LACY_HOME", str(folder / "home"))
        for here, there in ((corpus, "corpus"), (small_model, "models/small")):
            for path in here.iterdir():
                store.put(f"{store.url}/{there}/{path.name}", path.read_bytes())
        with closing(Forks(folder, (*LABEL, *TRAIN))) as run:
            yield store, run, folder / "home"


def same(store, url, local, corpus, model):
    """Asserts that the dataset in the store is the local one, and nothing else."""
    there = store.files(url)
    here = {str(path.relative_to(local)): path.read_bytes() for path in local.rglob("*") if path.is_file()}
    here.pop(".lock")
    assert there.keys() == here.keys()

    def localised(text):
        return text.replace(f"{store.url}/corpus", str(corpus)).replace(f"{store.url}/models/small", str(model))

    for name, data in here.items():
        if name.startswith("signals/"):
            table = pq.read_table(pa.BufferReader(there[name]))
            sources = [localised(source) for source in table["source"].to_pylist()]
            table = table.set_column(1, table.schema.field("source"), pa.array(sources))
            assert to_parquet(table).to_pybytes() == data, name
        elif name == "manifest.json":
            mine, theirs = json.loads(data), json.loads(localised(there[name].decode()))
            for part in mine["parts"] + theirs["parts"]:
                del part["bytes"], part["sha256"], part["deadletter_sha256"]  # of what names the corpus
            assert theirs == mine
        elif name.startswith("deadletter/"):
            assert localised(there[name].decode()).encode() == data, name
        else:
            assert there[name] == data, name
    assert store.uploads() == []


def test_the_whole_chain(chain, corpus, small_model, local, labeller, tmp_path):
    store, run, home = chain
    url = f"{store.new()}/d"
    store.proxy.every(9)
    done = run(*label(f"{store.url}/corpus", url, f"{store.url}/models/small"))
    assert done.returncode == 0, done.stderr
    assert store.proxy.faults() == set(KINDS)
    done = run("decide", url, "--policy", "loss", "--budget", 0.2)
    assert done.returncode == 0, done.stderr
    same(store, url, local, corpus, small_model)
    written = store.files(url)

    done = run("check", url)
    assert (done.returncode, done.stdout.strip().endswith("sound")) == (0, True), done.stdout + done.stderr
    tables = [command("stats", where, "--words", 3) for where, command in ((url, run), (local, labeller))]
    assert tables[0].returncode == 0 and tables[0].stdout.replace(url, str(local)) == tables[1].stdout
    done = run("sql", url, "SELECT count(*) AS n FROM tokens WHERE factual", "--format", "csv")
    assert int(done.stdout.split()[1]) == json.loads(written["manifest.json"])["factual"]
    options = ["--model", "tiny", "--context", 32, "--batch", 2, "--holdout", 0.1, "--loader-workers", 0]
    done = run("train", url, "--out", tmp_path / "run", "--max-steps", 20, *options)
    assert done.returncode == 0 and "done at step 20" in done.stderr, done.stderr

    store.proxy.every(0)
    store.proxy.requests.clear()
    done = run(*label(f"{store.url}/corpus", url, f"{store.url}/models/small"))
    assert done.returncode == 0, done.stderr
    assert not [request for request in store.proxy.requests if request.method == "PUT"]
    assert not [request for request in store.proxy.requests if request.path.endswith("model.safetensors")]
    assert len(list((home / "stored").glob("small-*"))) == 1, "the model was fetched once"
    done = run(*label(f"{store.url}/corpus", url, f"{store.url}/models/small", "--no-text"))
    assert done.returncode == 1 and "was begun with --text true, not false" in done.stderr
    assert store.files(url) == written


@pytest.mark.slow
def test_killed_and_finished_by_two_at_once(chain, corpus, small_model, local):
    store, run, _ = chain
    store.proxy.every(0)
    url = f"{store.new()}/d"
    arguments = label(f"{store.url}/corpus", url, f"{store.url}/models/small")
    command = [LACY, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(store.names(f"{url}/.parts")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    store.proxy.every(11)
    beside = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    done = run(*arguments)
    _, told = beside.communicate(timeout=200)
    assert (done.returncode, beside.returncode) == (0, 0), done.stderr + told
    assert "going on" in done.stderr + told
    done = run("decide", url, "--policy", "loss", "--budget", 0.2)
    assert done.returncode == 0, done.stderr
    same(store, url, local, corpus, small_model)
