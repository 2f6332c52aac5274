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

from tests.conftest import LACY
from tests.stores.conftest import SERVERS
from tests.stores.proxy import KINDS
from tests.support import corpora
from tests.support.forks import LABEL, Forks

PART_BYTES = 4096
TRAIN = ("lacy.trainer.train", "torch._dynamo", "transformers.models.gpt2.modeling_gpt2")


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


def contents(folder):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name != ".lock"}


def alike(files):
    """All but the card, which lists the label sets that there are."""
    return {name: data for name, data in files.items() if name != "README.md"}


def like(store, written, local, corpus):
    """Asserts that a dataset from the store's corpus is that of the local one, but for the paths in it."""
    here = contents(local)
    assert written.keys() == here.keys()
    for name, data in here.items():
        if name.startswith("signals/"):
            mine, theirs = (pq.read_table(pa.BufferReader(file)) for file in (data, written[name]))
            sources = [text.replace(f"{store.url}/corpus", str(corpus)) for text in theirs["source"].to_pylist()]
            assert sources == mine["source"].to_pylist()
            assert theirs.drop_columns(["source"]).equals(mine.drop_columns(["source"])), name
        elif name.startswith("deadletter/"):
            assert written[name].decode().replace(f"{store.url}/corpus", str(corpus)).encode() == data
        elif name != "manifest.json":
            assert written[name] == data, name


def test_the_whole_chain(chain, corpus, local, labeller, tmp_path):
    store, run, home = chain
    url = f"{store.new()}/d"
    store.proxy.every(9)
    done = run(*label(f"{store.url}/corpus", url, f"{store.url}/models/small"))
    assert done.returncode == 0, done.stderr
    assert store.proxy.faults() == set(KINDS)
    done = run("decide", url, "--policy", "loss", "--budget", 0.2)
    assert done.returncode == 0, done.stderr
    written = store.files(url)
    like(store, written, local, corpus)
    assert store.uploads() == []
    out = tmp_path / "local"
    done = run(*label(f"{store.url}/corpus", out, f"{store.url}/models/small"))
    assert done.returncode == 0, done.stderr
    assert {name: data for name, data in alike(written).items() if "labels/loss/" not in name} == alike(contents(out))

    done = run("check", url)
    assert (done.returncode, done.stdout.strip().endswith("sound")) == (0, True), done.stdout + done.stderr
    tables = [command("stats", where) for where, command in ((url, run), (local, labeller))]
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
    assert done.returncode == 2 and "was begun with --text true, not false" in done.stderr
    assert store.files(url) == written


@pytest.mark.slow
def test_killed_and_finished_by_two_at_once(chain, corpus, local):
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
    assert "resuming: " in done.stderr + told
    # Both measure the same; when both then decide at the same time, one of them may be told to come again.
    failed = [
        text.splitlines()[-1] for text, code in ((done.stderr, done.returncode), (told, beside.returncode)) if code
    ]
    assert len(failed) < 2 and all("decides" in line and "run this one again" in line for line in failed), failed
    done = run("decide", url, "--policy", "loss", "--budget", 0.2)
    assert done.returncode == 0, done.stderr
    like(store, store.files(url), local, corpus)
    assert store.uploads() == []
