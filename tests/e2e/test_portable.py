"""The same bytes on every runner: in one process, in three, and with a job server and workers that may die."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import LACY, run_lacy
from tests.e2e.portable import COUNT, Cluster, cluster
from tests.e2e.test_label import digests
from tests.pipeline import corpora

PATIENCE = 0.3  # minutes: what the workers that live need for one part, many times over


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    corpora.write(folder / "a.jsonl", corpora.documents(60, seed=1))
    corpora.write(folder / "b.jsonl.gz", corpora.documents(30, seed=2))
    return folder


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("machines")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(corpus, small_model, tmp_path_factory, labeller) -> dict[str, str]:
    """What one process writes, with two label sets."""
    out = tmp_path_factory.mktemp("undisturbed") / "d"
    done = labeller(*arguments(corpus, out, small_model, "--workers", 1))
    assert done.returncode == 0, done.stderr
    assert labeller("decide", out, "--policy", "loss", "--workers", 1).returncode == 0
    return digests(out)


def arguments(corpus: Path, out: Path, model: Path, *more: object) -> list[str]:
    fixed = ["label", corpus, "--out", out, "--reference", model, "--part-bytes", 2048]
    return [*map(str, fixed), *map(str, more)]


def portable(machines: Cluster, corpus: Path, out: Path, model: Path) -> list[str]:
    return [*arguments(corpus, out, model, "--patience", PATIENCE), "--", *machines.beam_options]


def test_a_worker_of_the_pool_is_killed_and_every_runner_writes_the_same_bytes(
    undisturbed, machines, corpus, small_model, tmp_path, labeller
):
    out = tmp_path / "d"
    command = portable(machines, corpus, out, small_model)
    run = subprocess.Popen([LACY, *command], stderr=subprocess.PIPE, text=True)
    wait_for_parts(run, out, 2)
    workers = machines.workers()
    networks = {os.readlink(f"/proc/{pid}/ns/net") for pid in (os.getpid(), *(worker.pid for worker in workers))}
    assert len(networks) == (1 + COUNT if machines.namespaces else 1)
    print("workers in network namespaces of their own" if machines.namespaces else "workers on loopback")
    assert len(workers) == COUNT
    workers[0].kill()

    here = tmp_path / "here"  # while the job server waits for the dead
    done = run_lacy(*arguments(corpus, here, small_model, "--workers", 3))
    assert done.returncode == 0, done.stderr

    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "a worker may have died; the job was cancelled; finished parts are kept" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr

    finished = {path.stem for path in (out / ".parts").glob("part-*.json")}
    assert len(finished) >= 2
    before = written(out, finished)
    done = labeller(*command)
    assert done.returncode == 0, done.stderr
    assert f"going on: {len(finished)} parts are finished" in done.stderr
    assert written(out, finished) == before
    assert len(finished) < len(json.loads((out / "manifest.json").read_text())["parts"])

    for dataset in (out, here):
        done = labeller("decide", dataset, "--policy", "loss", "--workers", 1)
        assert done.returncode == 0, done.stderr
        assert digests(dataset) == undisturbed


def written(dataset: Path, parts: set[str]) -> dict[str, tuple[int, int]]:
    """Which file each part is, and when it was written; parts without a document have none."""
    files = [path for path in (dataset / "signals").iterdir() if path.stem in parts]
    return {path.stem: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def wait_for_parts(run: subprocess.Popen, dataset: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while len(list((dataset / ".parts").glob("part-*.json"))) < count:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
