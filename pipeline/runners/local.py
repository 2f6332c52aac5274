"""Run a graph on this machine: in this process with one worker, in worker processes with more.

Beam's local runner does not notice a killed worker, does not end its workers when the launcher dies, and reports no
progress. So the graph runs in a thread while the main thread watches.
"""

import contextlib
import os
import re
import secrets
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from lacy.pipeline.runners.counts import Counts, PartCost
from lacy.pipeline.runners.heartbeat import Heartbeat, costs, total
from lacy.schemas.errors import LacyError, RunError

POLL = 0.2
GRACE = 5.0  # seconds that the run may take to end by itself after a worker has failed


def run(
    build: Callable[[beam.Pipeline, Heartbeat], None],
    *,
    workers: int = 1,
    beam_options: list[str] | None = None,
    on_progress: Callable[[Counts], None] | None = None,
    on_end: Callable[[Heartbeat], None] | None = None,
    debug: bool = False,
) -> list[PartCost]:
    """Run the graph that `build` adds to a pipeline, and return what each finished part took.

    Raises RunError when a step fails or a worker is killed, KeyboardInterrupt on Ctrl-C; no worker outlives either.
    on_end: called when the run has ended, however it ended.
    debug: let workers and Beam's threads write to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="lacy-") as folder:
        heartbeat = Heartbeat(folder, secrets.token_hex(8), os.getpid())
        options = PipelineOptions(beam_options or [], direct_num_workers=workers, save_main_session=False)
        log = None if debug else Path(folder) / "workers.log"
        runner = FnApiRunner(default_environment=_worker_processes(log) if workers > 1 else None)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with beam.Pipeline(runner=runner, options=options) as pipeline:
                    build(pipeline, heartbeat)
            except BaseException as error:
                failure.append(error)

        lost = threading.Event()
        before = threading.excepthook

        def on_thread_error(args: threading.ExceptHookArgs) -> None:
            if args.thread is not None and args.thread.name == "run_worker":  # Beam's thread: its process failed
                lost.set()
            if debug:
                before(args)

        threading.excepthook = on_thread_error
        thread = threading.Thread(target=work, daemon=True, name="beam")
        thread.start()
        try:
            _watch(thread, lost, Path(folder), on_progress)
        except BaseException:
            _kill_workers()
            raise
        finally:
            if on_end:
                on_end(heartbeat)
        threading.excepthook = before  # but not after a failure: Beam's threads may still raise
        if on_progress:
            on_progress(total(Path(folder)))
        if failure:
            _kill_workers()
            raise RunError(reason(failure[0])) from failure[0]
        return costs(Path(folder))


def _watch(
    thread: threading.Thread, lost: threading.Event, folder: Path, on_progress: Callable[[Counts], None] | None
) -> None:
    lost_at: float | None = None
    while thread.is_alive():
        thread.join(POLL)
        if lost.is_set() and lost_at is None:
            lost_at = time.monotonic()
        if on_progress:
            on_progress(total(folder))
        if lost_at is not None and time.monotonic() - lost_at > GRACE and thread.is_alive():
            raise RunError(_why(folder / "workers.log"))


def _worker_processes(log: Path | None) -> SubprocessSDKEnvironment:
    command = f"exec {shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main"
    return SubprocessSDKEnvironment.from_command_string(command + (f" 2>>{shlex.quote(str(log))}" if log else ""))


def _workers() -> list[psutil.Process]:
    workers = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "sdk_worker_main" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                workers.append(child)
        except psutil.NoSuchProcess:
            continue
    return workers


def _kill_workers() -> None:
    workers = _workers()
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(workers, timeout=GRACE)


def _why(log: Path) -> str:
    """Why a worker is gone: its last error, or else that it was killed."""
    error = _last_error(log.read_text(errors="replace")) if log.exists() else None
    return error or (
        "a worker process was killed (out of memory?); finished parts are kept: "
        "rerun the same command to resume, with fewer --workers if memory is short"
    )


def reason(error: BaseException) -> str:
    """The useful line of an error from Beam, which wraps a worker's traceback into its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return _last_error(str(error)) or _without_step((lines or [type(error).__name__])[-1])


def _last_error(text: str) -> str | None:
    """The last exception of a printed traceback, without its module and Beam's note on the step."""
    errors = [
        line for line in text.splitlines() if re.match(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b", line)
    ]
    if not errors:
        return None
    line = re.sub(r"^(?:[a-z_]\w*\.)+(?=[A-Z])", "", _without_step(errors[-1]))
    name, _, message = line.partition(": ")
    return message if message and name in _known_errors() else line


def _known_errors(kind: type[LacyError] = LacyError) -> set[str]:
    """The names of the errors whose messages stand by themselves."""
    return {kind.__name__}.union(*(_known_errors(below) for below in kind.__subclasses__()))


def _without_step(line: str) -> str:
    return re.sub(r"\s*\[while running .*$", "", line)
