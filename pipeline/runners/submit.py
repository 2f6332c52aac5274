"""Run a graph on another runner: Dataflow, Flink, Beam's job server, any that Beam options name.

The runner owns the workers. The launcher sees the dataset, where each finished part leaves a record: that is progress
on any runner, and a sign of life. Beam's own job server does not notice that a worker of a pool has died, and would
wait for it forever.
"""

import contextlib
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, StandardOptions
from apache_beam.runners.runner import PipelineState

from lacy.pipeline.runners.counts import Counts
from lacy.pipeline.runners.heartbeat import Heartbeat
from lacy.pipeline.runners.local import reason
from lacy.schemas.errors import DatasetError, RunError

HERE = (None, "FnApiRunner", "DirectRunner")  # DirectRunner itself is not used: it fetches a binary, ignores workers
PATIENCE = 1800.0
FIRST_PART = 3600.0  # machines must come up, with their image, and load models
POLL = 1.0
CANCEL_SECONDS = 60.0
KEPT = "finished parts are kept: rerun the same command to resume"


def elsewhere(beam_options: list[str] | None) -> bool:
    """Whether Beam options name a runner that is not on this machine."""
    return PipelineOptions(beam_options or []).view_as(StandardOptions).runner not in HERE


def absolute(name: str) -> str:
    """The absolute path of a file or folder, for processes in other folders; a URL or other name stays as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def run(
    build: Callable[[beam.Pipeline, Heartbeat], None],
    *,
    beam_options: list[str],
    name: str | None = None,
    count: Callable[[], Counts],
    complete: Callable[[], bool] = lambda: False,
    on_submit: Callable[[str], None] | None = None,
    on_progress: Callable[[Counts], None] | None = None,
    wait: bool = True,
    patience: float | None = None,
) -> None:
    """Submit the graph that `build` adds to a pipeline, and wait until the job has ended.

    name: name of the run; a run of the same name reuses engines that are still up
    count: counts what the dataset holds
    complete: whether all work is done; a job that makes no progress is then cancelled without an error
    on_submit: called with the job's id
    wait: False returns when the job is submitted
    patience: seconds without a finished part after which the job is cancelled, at least an hour before the first part;
        None: PATIENCE, unlimited on Dataflow

    Raises RunError when the job cannot be submitted, fails or makes no progress; on Ctrl-C KeyboardInterrupt, whose
    message says what became of the job.
    """
    options = PipelineOptions(beam_options, save_main_session=False)
    try:
        pipeline = beam.Pipeline(options=options)
    except ValueError as error:  # options that the runner refuses
        raise RunError(str(error).splitlines()[-1], usage=True) from error
    build(pipeline, Heartbeat(None, name or secrets.token_hex(8)))
    try:
        result: Any = pipeline.run()  # in this thread: some of Beam's runners set signal handlers
    except grpc.FutureTimeoutError:
        raise RunError(f"no job server answers at {options.view_as(PortableOptions).job_endpoint}") from None
    except Exception as error:
        raise RunError(f"the job could not be submitted: {_reason(error)}") from error
    if on_submit and getattr(result, "has_job", True):  # a Flex Template's launcher has no job: Dataflow starts it
        on_submit(_job_id(result))
    if not wait:
        return
    failure: list[str] = []

    def work() -> None:
        try:
            state = result.wait_until_finish()
            if state != PipelineState.DONE:
                failure.append(f"the job ended as {state}; {KEPT}")
        except BaseException as error:
            failure.append(_reason(error))

    thread = threading.Thread(target=work, daemon=True, name="job")
    thread.start()
    if patience is None:  # Dataflow watches its machines, and may tag all parts before it scores the first
        patience = math.inf if options.view_as(StandardOptions).runner == "DataflowRunner" else PATIENCE
    try:
        _watch(thread, count, on_progress, patience)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {_cancel(result)}; {KEPT}") from None
    except RunError as error:
        cancelled = _cancel(result)
        if complete():
            return
        raise RunError(f"{error}; {cancelled}; {KEPT}") from None
    if failure:
        raise RunError(failure[0])


def _watch(
    thread: threading.Thread,
    count: Callable[[], Counts],
    on_progress: Callable[[Counts], None] | None,
    patience: float,
) -> None:
    progressed, seen = time.monotonic(), (0, 0)
    while thread.is_alive():
        began = time.monotonic()
        with contextlib.suppress(DatasetError):  # a store that cannot be listed for a moment does not end the job
            counts = count()
            if on_progress:
                on_progress(counts)
            if (counts.parts, counts.planned_parts) != seen:
                progressed, seen = time.monotonic(), (counts.parts, counts.planned_parts)
        limit = patience if seen[0] else max(patience, FIRST_PART)
        if time.monotonic() - progressed > limit:
            raise RunError(f"no part was finished for {limit / 60:g} minutes: a worker may have died")
        thread.join(max(POLL, 10 * (time.monotonic() - began)))  # a listing of many parts takes seconds


def _cancel(result: Any) -> str:
    """Cancel a job; returns what became of it."""
    done = threading.Event()

    def cancel() -> None:
        with contextlib.suppress(Exception):
            result.cancel()
            done.set()

    thread = threading.Thread(target=cancel, daemon=True, name="cancel")
    thread.start()
    thread.join(CANCEL_SECONDS)
    return (
        "the job was cancelled" if done.is_set() else f"job {_job_id(result)} could not be cancelled and may still run"
    )


def _job_id(result: Any) -> str:
    job = getattr(result, "job_id", None) or getattr(result, "_job_id", "")  # Dataflow's; portable runners'
    return str(job() if callable(job) else job)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError):
        details = error.details() if isinstance(error, grpc.Call) else error
        return f"the job server is gone ({details}); {KEPT}"
    return reason(error)
