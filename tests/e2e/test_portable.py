"""The same bytes on every runner: in one process, in three, and with a job server and workers that may die.

All paths are relative: the workers of the pool run in another folder.
"""

import json
import os
import shutil
import subprocess
import time
import warnings
from pathlib import Path

import pytest

from tests.conftest import LACY, run_lacy
from tests.e2e.portable import COUNT, Cluster, cluster
from tests.e2e.test_label import digests
from tests.support import corpora

PATIENCE = 0.3  # minutes: what the workers that live need for one part, many times over


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the commands run."""
    folder = tmp_path_factory.mktemp("place")
    corpora.write(folder / "corpus" / "a.jsonl", corpora.documents(60, seed=1))
    corpora.write(folder / "corpus" / "b.jsonl.gz", corpora.documents(30, seed=2))
    return folder


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("machines")) as made:
        if not made.namespaces:
            warnings.warn("this machine allows no network namespaces: the workers are on loopback", stacklevel=1)
        yield made


@pytest.fixture(scope="module")
def undisturbed(place, small_model, labeller) -> dict[str, str]:
    """What one process writes, with two label sets."""
    done = labeller(*arguments("undisturbed", small_model, "--workers", 1), cwd=place)
    assert done.returncode == 0, done.stderr
    done = labeller("decide", "undisturbed", "--policy", "loss", "--workers", 1, cwd=place)
    assert done.returncode == 0, done.stderr
    return digests(place / "undisturbed")


def arguments(out: str, model: Path, *more: object) -> list[str]:
    return [*map(str, ["label", "corpus", "--out", out, "--reference", model, "--part-bytes", 2048, *more])]


def portable(machines: Cluster, out: str, model: Path) -> list[str]:
    return [*arguments(out, model, "--patience", PATIENCE), "--", *machines.beam_options]


def test_a_worker_of_the_pool_is_killed_and_every_runner_writes_the_same_bytes(
    undisturbed, machines, place, small_model, labeller
):
    command = portable(machines, "killed", small_model)
    run = subprocess.Popen([LACY, *command], stderr=subprocess.PIPE, text=True, cwd=place)
    wait_for_parts(run, place / "killed", 2)
    workers = machines.workers()
    networks = {os.readlink(f"/proc/{pid}/ns/net") for pid in (os.getpid(), *(worker.pid for worker in workers))}
    assert len(networks) == (1 + COUNT if machines.namespaces else 1)
    assert len(workers) == COUNT
    workers[0].kill()

    # In three processes of this machine, while the job server waits for the dead one.
    done = run_lacy(*arguments("three", small_model, "--workers", 3), cwd=place)
    assert done.returncode == 0, done.stderr

    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "a worker may have died; the job was cancelled; finished parts are kept" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr

    finished = {path.stem for path in (place / "killed" / ".parts").glob("part-*.json")}
    before = written(place / "killed", finished)
    done = labeller(*command, cwd=place)
    assert done.returncode == 0, done.stderr
    assert f"resuming: {len(finished)} parts are finished" in done.stderr
    assert written(place / "killed", finished) == before
    assert len(finished) < len(json.loads((place / "killed" / "manifest.json").read_text())["parts"])

    preset = ["--on", "portable", "--job-endpoint", machines.job_endpoint, "--worker-pool", machines.pool]
    for decide in (["killed", "--policy", "loss", *preset], ["three", "--policy", "loss", "--workers", 1]):
        done = labeller("decide", *decide, cwd=place)
        assert done.returncode == 0, done.stderr
        assert digests(place / decide[0]) == undisturbed


@pytest.mark.slow
def test_a_launcher_is_killed_and_its_workers_do_not_spoil_what_comes_after(machines, place, small_model, labeller):
    command = portable(machines, "replaced", small_model)
    run = subprocess.Popen([LACY, *command], stderr=subprocess.PIPE, text=True, cwd=place)
    out = place / "replaced"
    wait_for_parts(run, out, 1)
    refused = labeller(*command, cwd=place)
    assert refused.returncode == 1 and "another run is writing" in refused.stderr
    run.kill()
    run.communicate()
    assert len(machines.workers()) >= COUNT  # nobody told them
    while out.exists():  # and another command takes the place of theirs, as they work on
        shutil.rmtree(out, ignore_errors=True)
        time.sleep(0.5)  # in which what they had begun to write is there again

    for name in ("replaced", "fresh"):
        done = labeller(*arguments(name, small_model, "--workers", 1, "--window", 64), cwd=place)
        assert done.returncode == 0, done.stderr
    quiet(machines)
    assert not (out / ".parts").exists()
    assert digests(out) == digests(place / "fresh")


@pytest.mark.slow
def test_a_launcher_is_killed_and_the_same_command_goes_on_beside_its_workers(
    undisturbed, machines, place, small_model, labeller
):
    command = portable(machines, "orphans", small_model)
    run = subprocess.Popen([LACY, *command], stderr=subprocess.PIPE, text=True, cwd=place)
    wait_for_parts(run, place / "orphans", 2)
    run.kill()
    run.communicate()
    done = labeller(*command, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "resuming: " in done.stderr
    quiet(machines)
    assert not (place / "orphans" / ".parts").exists()
    done = labeller("decide", "orphans", "--policy", "loss", "--workers", 1, cwd=place)
    assert done.returncode == 0, done.stderr
    assert digests(place / "orphans") == undisturbed


def quiet(machines: Cluster) -> None:
    """Wait until no worker does anything any more."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        workers = machines.workers()
        before = [sum(worker.cpu_times()[:2]) for worker in workers]
        time.sleep(2)
        if all(sum(worker.cpu_times()[:2]) - then < 0.2 for worker, then in zip(workers, before, strict=True)):
            return
    raise AssertionError("the workers are still at work")


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
