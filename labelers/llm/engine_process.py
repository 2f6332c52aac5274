"""The process of one engine: it loads a model, then answers the requests of `lacy.labelers.llm.engines` one by one.

    python -m lacy.labelers.llm.engine_process FOLDER ROLE INDEX LAUNCHER

The socket appears once the model is loaded. A request names a method of the model, its items and its arguments; the
answers are ("began",), any number of ("tokens", n), then ("done", results, seconds) or ("died", reason). After "died"
the process ends: an exception may leave the engine in any state.
"""

import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

IDLE_SECONDS = 60.0  # without a client before it ends: on a cluster, no message says that the run is over


def main() -> None:
    folder, role, index, launcher = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    spec = json.loads((folder / f"{role}.json").read_text())
    if launcher:
        _end_with(launcher)
    choose_gpus(index, spec["gpus"])
    try:
        module, _, name = spec["factory"].partition(":")
        model = getattr(importlib.import_module(module), name)(**spec["arguments"])
    except BaseException as error:
        (folder / f"{role}-{index}.error").write_text(f"{type(error).__name__}: {_line(error)}")
        raise
    serve(model, str(folder / f"{role}-{index}.sock"), (folder / "key").read_bytes())
    (folder / f"{role}-{index}.pid").unlink(missing_ok=True)  # not a death: a later start is not a restart
    os._exit(0)


def choose_gpus(index: int, count: int) -> None:
    """Restrict CUDA to the GPUs of engine `index`: `count` for each engine, of the visible ones."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = range(index * count, (index + 1) * count)
    names = visible.split(",") if visible else [str(number) for number in range(mine.stop)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
        names[mine.start : mine.stop]
    )  # empty for one engine too many: CUDA finds none


def serve(model: Any, address: str, key: bytes) -> None:
    """Answer the requests of all clients on a socket, until there has been no client for IDLE_SECONDS."""
    Path(address).unlink(missing_ok=True)
    requests: queue.Queue[tuple[Connection, tuple[str, list[Any], dict[str, Any], bool]]] = queue.Queue()
    clients: set[int] = set()
    greeting = {"path": getattr(model, "path", None), "context": getattr(model, "context", None)}

    def read(client: Connection) -> None:
        try:
            client.send(greeting)
            while True:
                requests.put((client, client.recv()))
        except (EOFError, OSError):
            clients.discard(id(client))

    def accept(listener: Listener) -> None:
        while True:
            try:
                client = listener.accept()
            except Exception:  # a client without the key, or one that left during the handshake
                continue
            clients.add(id(client))
            threading.Thread(target=read, args=(client,), daemon=True).start()

    threading.Thread(target=accept, args=(Listener(address, authkey=key, backlog=128),), daemon=True).start()
    alone_since = time.monotonic()
    while time.monotonic() - alone_since < IDLE_SECONDS:
        try:
            client, request = requests.get(timeout=1)
        except queue.Empty:
            alone_since = time.monotonic() if clients else alone_since
            continue
        _answer(model, client, request)
        alone_since = time.monotonic()


def _answer(model: Any, client: Connection, request: tuple[str, list[Any], dict[str, Any], bool]) -> None:
    method, items, arguments, wants_tokens = request
    if wants_tokens:
        arguments = arguments | {"on_tokens": lambda count: _send(client, ("tokens", count))}
    if not _send(client, ("began",)):
        return
    started = time.monotonic()
    try:
        results = getattr(model, method)(items, **arguments)
    except BaseException as error:
        traceback.print_exc()
        _send(client, ("died", f"{type(error).__name__}: {_line(error)}"))
        os._exit(1)
    _send(client, ("done", results, time.monotonic() - started))


def _send(client: Connection, message: tuple[Any, ...]) -> bool:
    try:
        client.send(message)
    except OSError:  # the worker is gone; another one repeats its part
        return False
    return True


def _end_with(launcher: int) -> None:
    """Kill this process's group once the launcher has ended."""

    def watch() -> None:
        while True:
            try:
                os.kill(launcher, 0)
            except ProcessLookupError:
                os.killpg(os.getpgid(0), signal.SIGKILL)
            except PermissionError:
                pass
            time.sleep(1)

    threading.Thread(target=watch, daemon=True, name="launcher watch").start()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    main()
