"""100,000 parts in a manifest: what is said of them takes seconds, not hours, and little memory."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from lacy.pipeline.check import check
from lacy.pipeline.decide import decided
from lacy.pipeline.status import status
from lacy.schemas.manifest import label_sets, read_complete
from tests.conftest import LACY
from tests.support import many_parts

MANY = 100_000
SECONDS, MEGABYTES = 30, 1000  # of one core, where a command has one thread: wall clocks of a busy machine say little


@dataclass
class Done:
    code: int
    out: str
    wall: float
    cpu: float
    megabytes: float


# A process begins with the peak of the one that starts it, and pytest's is large: so a small one stands between.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stderr=subprocess.STDOUT)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, file=sys.stderr)
"""


def measured(*arguments: object) -> Done:
    """A real command in a process of its own."""
    started = time.monotonic()
    command = [sys.executable, "-c", MEASURE, LACY, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
    code, cpu, megabytes = ran.stderr.split()
    done = Done(int(code), ran.stdout, time.monotonic() - started, float(cpu), float(megabytes))
    print(f"{arguments[0]}: {done.wall:.1f} s, {done.cpu:.1f} s of cores, {done.megabytes:.0f} MB", file=sys.stderr)
    return done


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [1000, pytest.param(MANY, marks=pytest.mark.slow)])
def test_commands_on_a_finished_dataset(tiny, small_model, tmp_path, count):
    dataset = tmp_path / "d"
    corpus = many_parts.multiply(tiny, dataset, count)
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*.json")}
    told = measured("status", dataset)
    assert told.code == 0 and f"{count:,} of {count:,}" in told.out
    quick = measured("check", dataset, "--quick")
    assert quick.code == 0 and quick.out.strip().endswith("sound by names, sizes and totals")
    again = measured(*many_parts.label(corpus, dataset, small_model))
    assert again.code == 0 and "labels/lacy: as decided before" in again.out
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*.json")} == before
    full = measured("check", dataset, "--workers", 2)
    assert full.code == 0 and full.out.strip().endswith("sound")
    for done in (told, quick, again):
        assert done.cpu < SECONDS and done.megabytes < MEGABYTES
    assert full.cpu < SECONDS * 4 * max(count, MANY / 10) / MANY and full.megabytes < MEGABYTES


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [1000, pytest.param(MANY, marks=pytest.mark.slow)])
def test_status_of_an_interrupted_run(tiny, tmp_path, count):
    many_parts.multiply(tiny, tmp_path / "d", count, running=True)
    done = measured("status", tmp_path / "d")
    assert done.code == 0 and "all parts are measured" in done.out
    assert done.cpu < SECONDS and done.megabytes < MEGABYTES


def test_work_grows_as_parts_do(tiny, tmp_path):
    few, more = tmp_path / "few", tmp_path / "more"
    for dataset, count in ((few, 300), (more, 1200)):
        many_parts.multiply(tiny, dataset, count)

    def complete(dataset):
        assert not list(check(dataset, read_complete(dataset), label_sets(dataset)))

    for work in (complete, status, lambda dataset: decided(dataset, "lacy")):
        assert calls(work, more) < 5 * calls(work, few)


def calls(work: Callable, *arguments) -> int:
    """How many functions are called, and generators resumed, in all threads."""
    counted = [0]

    def count(_frame, event, _argument):
        counted[0] += event in ("call", "c_call")

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work(*arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return counted[0]
