"""Jobs on one of Beam's job servers in this process: submitted, watched, failed, cancelled."""

import threading
import time

import apache_beam as beam
import pytest

from lacy.pipeline.runners import submit
from lacy.pipeline.runners.counts import Counts
from lacy.schemas.errors import RunError

HERE = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"]
seen: list[int] = []
released = threading.Event()  # what a DoFn that stands still waits for


@pytest.fixture(autouse=True)
def _release():
    released.clear()
    yield
    released.set()


def graph(step):
    return lambda pipeline, _: pipeline | beam.Create([1, 2, 3]) | beam.Map(step) and None


def stand_still(element):
    released.wait(60)


def seen_by_a_worker(element):
    seen.append(element)


def fail(element):
    raise ValueError(f"element {element} is odd")


def nothing() -> Counts:
    return Counts()


@pytest.mark.parametrize(
    ("beam_options", "far"),
    [
        (None, False),
        ([], False),
        (["--runner=FnApiRunner"], False),
        (["--runner", "DirectRunner"], False),
        (["--runner=FlinkRunner"], True),
        (["--project=p", "--runner", "DataflowRunner"], True),
        (HERE, True),
    ],
)
def test_options_that_name_another_runner(beam_options, far):
    assert submit.elsewhere(beam_options) is far


def test_a_job_is_waited_for():
    seen.clear()
    jobs, told = [], []
    submit.run(
        graph(seen_by_a_worker), beam_options=HERE, count=nothing, on_submit=jobs.append, on_progress=told.append
    )
    assert sorted(seen) == [1, 2, 3]
    assert len(jobs) == 1 and jobs[0].startswith("job-")
    assert told


def test_a_job_that_is_not_waited_for():
    began = time.monotonic()
    submit.run(graph(stand_still), beam_options=HERE, count=nothing, wait=False)
    assert time.monotonic() - began < 30
    assert not released.is_set()


def test_what_a_worker_raised_is_one_line():
    with pytest.raises(RunError) as told:
        submit.run(graph(fail), beam_options=HERE, count=nothing)
    assert str(told.value) == "ValueError: element 1 is odd"


def test_no_job_server():
    with pytest.raises(RunError, match=r"^no job server answers at localhost:1$"):
        options = ["--runner=PortableRunner", "--job_endpoint=localhost:1", "--job_server_timeout=1"]
        submit.run(graph(fail), beam_options=options, count=nothing)


def test_a_runner_that_there_is_not():
    with pytest.raises(RunError, match=r"^Unexpected pipeline runner: NoRunner") as told:
        submit.run(graph(fail), beam_options=["--runner=NoRunner"], count=nothing)
    assert len(str(told.value).splitlines()) == 1


def test_a_stalled_job_is_cancelled():
    with pytest.raises(RunError) as told:
        submit.run(graph(stand_still), beam_options=HERE, count=lambda: Counts(parts=1), patience=0.5)
    assert "a worker may have died; the job was cancelled; finished parts are kept" in str(told.value)


def test_a_stalled_job_with_nothing_left_to_do_is_done():
    everything = {"count": lambda: Counts(parts=1), "complete": lambda: True}
    submit.run(graph(stand_still), beam_options=HERE, patience=0.5, **everything)
    assert not released.is_set()


def test_machines_may_take_long_until_the_first_part():
    def come_up() -> None:
        time.sleep(3 * submit.POLL)
        released.set()

    threading.Thread(target=come_up, daemon=True).start()
    submit.run(graph(stand_still), beam_options=HERE, count=nothing, patience=0.5)


def test_ctrl_c_cancels_the_job_and_says_so():
    def interrupt(_: Counts) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^stopped; the job was cancelled; finished parts are kept"):
        submit.run(graph(stand_still), beam_options=HERE, count=nothing, on_progress=interrupt)
