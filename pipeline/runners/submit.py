"""Run a graph on another runner: Dataflow, Flink, a job server of Beam's, any that Beam options name.

The runner owns the workers; the launcher sees the dataset, where each finished part leaves a record. That is progress
on any runner, and a sign of life: Beam's own job server does not notice that a worker of a pool has died, and would
wait for it for ever.
"""

import contextlib
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, StandardOptions
from apache_beam.runners.runner import PipelineState

from lacy.pipeline.corpus import spool
from lacy.pipeline.runners.heartbeat import Counts, Heartbeat
from lacy.pipeline.runners.local import reason
from lacy.pipeline.status import Measured, update
from lacy.schemas.errors import DatasetError, RunError
from lacy.schemas.files import modified, sizes

HERE = (None, "FnApiRunner", "DirectRunner")  # Beam's DirectRunner would fetch a binary, and ignore the worker count
PATIENCE = 1800.0
FIRST_PART = 3600.0  # machines must come up, with their image, and load models
POLL = 1.0
CANCEL_SECONDS = 60.0
KEPT = "finished parts are kept: run the same command again to go on"


def elsewhere(beam_options: list[str] | None) -> bool:
    """Whether Beam options name a runner that is not of this machine."""
    return PipelineOptions(beam_options or []).view_as(StandardOptions).runner not in HERE


def absolute(name: str) -> str:
    """The path of what is a file or folder here, for processes in other folders; a URL, or another name, stays."""
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

    name: of the run; one of the same name finds its engines, where some still stand
    count: what is finished, by the dataset (`counter`)
    complete: whether all is finished, whatever the job waits for: then one that stands still is cancelled as done
    on_submit: told the job's id
    wait: False ends when the job is submitted
    patience: seconds without a newly finished part after which the job is given up and cancelled, before the first one
        an hour at least; None: PATIENCE, and without end on Dataflow

    Raises RunError when the job cannot be submitted, fails, or stands still; KeyboardInterrupt, with what became of
    the job, on Ctrl-C.
    """
    options = PipelineOptions(beam_options, save_main_session=False)
    try:
        pipeline = beam.Pipeline(options=options)
    except ValueError as error:  # options that the runner refuses
        raise RunError(str(error).splitlines()[-1]) from error
    build(pipeline, Heartbeat(None, name or secrets.token_hex(8)))
    try:
        result: Any = pipeline.run()  # in this thread: some runners of Beam set signal handlers
    except grpc.FutureTimeoutError:
        raise RunError(f"no job server answers at {options.view_as(PortableOptions).job_endpoint}") from None
    except Exception as error:
        raise RunError(f"the job could not be submitted: {_reason(error)}") from error
    if on_submit and getattr(result, "has_job", True):  # a Flex Template's launcher leaves it to Dataflow to begin one
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
    if patience is None:  # Dataflow looks after its machines, and may tag all parts before the first is scored
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


def counter(dataset: Path, before: Set[str], bytes_of: dict[str, int]) -> Callable[[], Counts]:
    """What counts the parts that are finished from now on, by their records, and those that were cut from streams.

    `before` were finished by an earlier run; `bytes_of` the corpus a part has, where that is known.
    """
    earlier = modified(dataset / ".parts", "part-*.json")
    known = {name: Measured(0, 0, 0, at) for file, at in earlier.items() if (name := file[:-5]) in before}
    cut: set[str] = set()

    def count() -> Counts:
        update(dataset, known)
        copies = {name.partition(".")[0] for name in sizes(dataset / spool.FOLDER, "part-*")}
        cut.update((copies | known.keys()) - before - bytes_of.keys())
        return Counts(
            documents=sum(part.rows for part in known.values()),
            tokens=sum(part.tokens for part in known.values()),
            bad=sum(part.bad for part in known.values()),
            parts=len(known.keys() - before),
            bytes=sum(bytes_of.get(name, 0) for name in known),
            planned_parts=len(cut),
        )

    return count


def _watch(
    thread: threading.Thread,
    count: Callable[[], Counts],
    on_progress: Callable[[Counts], None] | None,
    patience: float,
) -> None:
    alive, seen = time.monotonic(), (0, 0)
    while thread.is_alive():
        began = time.monotonic()
        with contextlib.suppress(DatasetError):  # a store that cannot be listed now does not end the job
            counts = count()
            if on_progress:
                on_progress(counts)
            if (counts.parts, counts.planned_parts) != seen:
                alive, seen = time.monotonic(), (counts.parts, counts.planned_parts)
        limit = patience if seen[0] else max(patience, FIRST_PART)
        if time.monotonic() - alive > limit:
            raise RunError(f"no part was finished for {limit / 60:g} minutes: a worker may have died")
        thread.join(max(POLL, 10 * (time.monotonic() - began)))  # a listing of many parts takes seconds


def _cancel(result: Any) -> str:
    """Cancel a job, and say what became of it."""
    done = threading.Event()

    def cancel() -> None:
        with contextlib.suppress(Exception):
            result.cancel()
            done.set()

    thread = threading.Thread(target=cancel, daemon=True, name="cancel")
    thread.start()
    thread.join(CANCEL_SECONDS)
    return "the job was cancelled" if done.is_set() else f"job {_job_id(result)} could not be cancelled and may go on"


def _job_id(result: Any) -> str:
    found = getattr(result, "job_id", None) or getattr(result, "_job_id", "")  # Dataflow's, and portable runners'
    return str(found() if callable(found) else found)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError):
        details = error.details() if isinstance(error, grpc.Call) else error
        return f"the job server is gone ({details}); {KEPT}"
    return reason(error)
