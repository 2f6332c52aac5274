"""Engines: models in processes of their own, which all workers of a machine share, and which may die.

The workers of a run read and tag on all cores. What needs a model they send, one slice of a part at a time, to one of a
few engines: one for each GPU, or group of GPUs. While an engine works on a slice, the workers prepare the next. The
first worker that needs an engine starts it, under a lock, so a common folder is all that any Beam runner has to offer.

An engine that dies (out of memory, killed, a bug in a kernel) is restarted, and its slice is tried again whole: most
deaths have nothing to do with the slice, and the same slice gives the same bytes. After a second death the slice is
halved, and so on; an item that kills an engine twice on its own is given up, with the reason. Slices that were queued
at the time are sent again.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from filelock import FileLock, Timeout

from lacy.labelers.llm.chat import Reply
from lacy.labelers.llm.scorer import Scores
from lacy.labelers.llm.windows import slices
from lacy.schemas.errors import ModelError

SLICE_TOKENS = 1 << 18  # in one request: what a death loses, and what the engine holds in memory at once
SLICE_CONVERSATIONS = 256
QUEUED = 2  # requests that an engine has at a time, including the one in progress
POLL = 0.01
START_SECONDS = 3600.0
STALLED_SECONDS = 1800.0  # after which a silent engine counts as dead
RESTARTS = (0.0, 2.0, 10.0, 30.0)  # seconds before each try: a dead engine's memory is not freed at once
KILL_SECONDS = 10.0
MAX_DEATHS = 40  # in a row, without one answer


@dataclass(frozen=True)
class EngineSpec:
    """A model that engines load: `factory(**arguments)`, with `factory` as "module:function".

    role   names the engines' files: "reference", "student", "judge"
    count  engines on one machine
    gpus   GPUs of each engine
    """

    role: str
    factory: str
    arguments: dict[str, Any]
    count: int = 1
    gpus: int = 1


@dataclass(frozen=True)
class Died:
    """In place of a result: every engine died of this item."""

    reason: str


def run_folder(key: str) -> Path:
    """The folder that the processes of the run `key` share on this machine."""
    name = f"lacy-{os.getuid()}-{key}"
    folder = Path(tempfile.gettempdir()) / name
    return folder if len(str(folder)) < 70 else Path("/tmp") / name  # a socket's path has at most 107 characters


class Engines:
    """The engines of one spec, as one worker sees them; threads may share it.

    folder      the run's folder on this machine (`run_folder`)
    launcher    id of a process whose end ends the engines; 0: they end after a minute without a connected worker
    on_restart  called when an engine has been restarted
    """

    def __init__(
        self, spec: EngineSpec, folder: Path, launcher: int = 0, on_restart: Callable[[], None] | None = None
    ) -> None:
        self.spec, self.folder, self.launcher, self.on_restart = spec, folder, launcher, on_restart
        self.seconds = 0.0  # of engine time spent on this worker's requests
        self.greeting: dict[str, Any] = {}
        self._own = threading.local()
        self._children: list[subprocess.Popen[bytes]] = []
        _make_private(folder)
        with FileLock(folder / "folder.lock"):
            if not (folder / "key").exists():
                _write(folder / "key", secrets.token_bytes(32))
            if not (folder / f"{spec.role}.json").exists():
                fields = {"factory": spec.factory, "arguments": spec.arguments, "gpus": spec.gpus}
                _write(folder / f"{spec.role}.json", json.dumps(fields).encode())
        with self._slot() as index:  # a model that cannot be loaded fails here
            self._connect(index)

    def run(
        self, method: str, items: list[Any], *, on_tokens: Callable[[int], None] | None = None, **arguments: Any
    ) -> list[Any]:
        """`model.method(items, **arguments)` on one of the engines: a result for each item, or `Died`.

        Raises ModelError if engines cannot be started, or die again and again whatever their slice.
        """
        results: list[Any] = [None] * len(items)
        todo = [(0, len(items), 2)] if items else []  # from, to, deaths until it is halved or given up
        deaths = 0
        while todo:
            begin, end, tries = todo.pop()
            try:
                results[begin:end] = self._ask(method, items[begin:end], arguments, on_tokens)
                deaths = 0
                continue
            except _EngineDeathError as error:
                reason = str(error)
                if not error.began:
                    todo.append((begin, end, tries))
                    continue
            deaths += 1
            if deaths > MAX_DEATHS:
                raise ModelError(f"the {self.spec.role} engine died {deaths} times in a row: {reason}")
            if tries > 1:
                todo.append((begin, end, tries - 1))
            elif end - begin == 1:
                results[begin] = Died(f"the {self.spec.role} engine dies of it ({reason})")
            else:
                middle = (begin + end) // 2
                todo += [(a, b, 2 if b - a == 1 else 1) for a, b in ((middle, end), (begin, middle))]
        return results

    def close(self) -> None:
        """Disconnect from the engines, which go on serving other workers."""
        for connection in vars(self._own).values():
            connection.close()
        vars(self._own).clear()

    def _ask(
        self, method: str, items: list[Any], arguments: dict[str, Any], on_tokens: Callable[[int], None] | None
    ) -> list[Any]:
        with self._slot() as index:
            began = False
            try:
                connection = self._connect(index)
                connection.send((method, items, arguments, on_tokens is not None))
                while True:
                    if began and not connection.poll(STALLED_SECONDS):
                        _kill(self._path(index, "pid"))
                        raise _EngineDeathError("it stalled", True)
                    message = connection.recv()
                    if message[0] == "began":
                        began = True
                    elif message[0] == "tokens" and on_tokens:
                        on_tokens(message[1])
                    elif message[0] == "died":
                        raise _EngineDeathError(message[1], True)
                    elif message[0] == "done":
                        self.seconds += message[2]
                        return message[1]
            except (EOFError, OSError):
                self._drop(index)
                raise _EngineDeathError("it was killed", began) from None
            except BaseException:
                self._drop(index)  # nobody will read the rest of the answer
                raise

    @contextlib.contextmanager
    def _slot(self) -> Iterator[int]:
        """The index of an engine with room for one more request, the least busy first."""
        count = self.spec.count
        order = [(os.getpid() + number) % count for number in range(count)]
        while True:
            for depth in range(QUEUED):
                for index in order:
                    lock = FileLock(self._path(index, f"{depth}.lock"))
                    try:
                        lock.acquire(timeout=0)
                    except Timeout:
                        continue
                    try:
                        yield index
                    finally:
                        lock.release()
                    return
            time.sleep(POLL)

    def _connect(self, index: int) -> Connection:
        name = f"engine_{index}"
        if not hasattr(self._own, name):
            with FileLock(self._path(index, "start.lock")):
                connection = self._reach(index) or self._start(index)
            self.greeting = connection.recv()
            setattr(self._own, name, connection)
        return getattr(self._own, name)

    def _drop(self, index: int) -> None:
        connection = self._own.__dict__.pop(f"engine_{index}", None)
        if connection is not None:
            connection.close()

    def _reach(self, index: int) -> Connection | None:
        try:
            return Client(str(self._path(index, "sock")), authkey=(self.folder / "key").read_bytes())
        except (OSError, EOFError, AuthenticationError):
            return None

    def _start(self, index: int) -> Connection:
        again = self._path(index, "pid").exists()
        for wait in RESTARTS if again else RESTARTS[:1]:
            _kill(self._path(index, "pid"))
            time.sleep(wait)
            connection = self._launch(index)
            if connection:
                if again and self.on_restart:
                    self.on_restart()
                return connection
        error = self._path(index, "error")
        reason = error.read_text() if error.exists() else _last_line(self._path(index, "log")) or "it printed nothing"
        raise ModelError(f"the {self.spec.role} engine does not start: {reason.removeprefix('ModelError: ')}")

    def _launch(self, index: int) -> Connection | None:
        self._children = [child for child in self._children if child.poll() is None]
        command = [sys.executable, "-m", "lacy.labelers.llm.engine_process"]
        with open(self._path(index, "log"), "ab") as log:
            process = subprocess.Popen(
                [*command, str(self.folder), self.spec.role, str(index), str(self.launcher)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its own children die with its process group
            )
        self._children.append(process)
        with contextlib.suppress(psutil.NoSuchProcess):
            born = psutil.Process(process.pid).create_time()
            _write(self._path(index, "pid"), json.dumps([process.pid, born]).encode())
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            if connection := self._reach(index):
                return connection
            time.sleep(0.1)
        return None

    def _path(self, index: int, kind: str) -> Path:
        return self.folder / f"{self.spec.role}-{index}.{kind}"


class EngineScorer:
    """The Scorer protocol of `lacy.labelers.llm.scorer` on engines whose factory is `load:scorer`."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self.path: str | None = engines.greeting["path"]

    def score(self, documents: list[np.ndarray], on_tokens: Callable[[int], None] | None = None) -> list[Scores]:
        results: list[Scores] = []
        for begin, end in slices([document.size for document in documents], SLICE_TOKENS):
            batch = documents[begin:end]
            answers = self.engines.run("score", batch, on_tokens=on_tokens)
            results += [
                Scores(np.full(document.size, np.nan, np.float32), None, answer.reason, fatal=True)
                if isinstance(answer, Died)
                else answer
                for document, answer in zip(batch, answers, strict=True)
            ]
        return results

    def close(self) -> None:
        self.engines.close()


class EngineChat:
    """The Chat protocol of `lacy.labelers.llm.chat` on engines whose factory is `load:chat`."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self.context: int | None = engines.greeting["context"]

    def ask(
        self, conversations: list[list[dict[str, str]]], schema: dict[str, Any] | None, max_tokens: int
    ) -> list[Reply]:
        replies: list[Reply] = []
        for begin in range(0, len(conversations), SLICE_CONVERSATIONS):
            batch = conversations[begin : begin + SLICE_CONVERSATIONS]
            answers = self.engines.run("ask", batch, schema=schema, max_tokens=max_tokens)
            replies += [Reply(None, answer.reason) if isinstance(answer, Died) else answer for answer in answers]
        return replies

    def close(self) -> None:
        self.engines.close()


def stop(folder: Path) -> None:
    """End all engines of a folder, and remove it."""
    for path in folder.glob("*.pid"):
        _kill(path)
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()


class _EngineDeathError(Exception):
    def __init__(self, reason: str, began: bool) -> None:
        super().__init__(reason)
        self.began = began


def _kill(pid_file: Path) -> None:
    """Kill an engine's process group: its children may outlive it."""
    try:
        group, born = json.loads(pid_file.read_text())
    except (FileNotFoundError, ValueError):
        return
    killed = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.create_time() >= born:
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=KILL_SECONDS)


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ModelError(f"{folder} belongs to another user: remove it")


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    temporary.replace(path)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
