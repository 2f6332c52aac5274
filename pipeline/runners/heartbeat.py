"""How workers report progress.

On any runner: Beam metrics in the namespace NAMESPACE, and one line of JSON in the log for each finished part. On this
machine Beam's metrics arrive only when the run ends, so each worker also writes a small file of counters, which the
launcher adds up. Neither a name nor a line holds text of a document.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from apache_beam.metrics import Metrics

from lacy.pipeline.runners.counts import Counts, PartCost

log = logging.getLogger(__name__)

NAMESPACE = "lacy"
INTERVAL = 0.5


@dataclass(frozen=True)
class Heartbeat:
    """Where the workers of a run report."""

    folder: str | None  # None on runners that share no disk with the launcher
    run: str  # unique name of the run
    launcher: int = 0  # process id

    def start(self) -> None:
        """Called once in each worker: ends the worker when the launcher is gone."""
        if self.folder and self.launcher not in (0, os.getpid()):
            _watch(self.launcher)

    def scored(self, tokens: int) -> None:
        """More tokens of an unfinished part have a score."""
        self._change(lambda counts: setattr(counts, "scored", counts.scored + tokens))

    def planned(self, parts: int, size: int) -> None:
        def change(counts: Counts) -> None:
            counts.planned_parts += parts
            counts.planned_bytes += size

        self._change(change)

    def restarted(self) -> None:
        """An engine died and was restarted."""
        _count("engine_restarts", 1)
        log.warning(json.dumps({"event": "engine restarted"}))
        self._change(lambda counts: setattr(counts, "restarts", counts.restarts + 1), now=True)

    def finished(self, part: str, cost: PartCost, bad: Sequence[str]) -> None:
        """A part is on disk. `bad` are the codes of its dead letters."""
        _measure(cost, bad)
        log.info(json.dumps({"event": "part finished", "part": part, "bad": len(bad)} | asdict(cost)))

        def change(counts: Counts) -> None:
            counts.documents += cost.documents
            counts.tokens += cost.tokens
            counts.bad += len(bad)
            counts.bytes += cost.bytes
            counts.parts += 1
            counts.scored = 0

        self._change(change, now=True)
        if self.folder is not None:
            with open(Path(self.folder) / f"{os.getpid()}.parts", "a") as file:
                file.write(json.dumps(asdict(cost)) + "\n")

    def _change(self, change: Callable[[Counts], None], now: bool = False) -> None:
        if self.folder is None:
            return
        state = _states.setdefault(self.folder, _State())
        with state.lock:
            change(state.counts)
            if now or time.monotonic() - state.written > INTERVAL:
                state.written = time.monotonic()
                path = Path(self.folder) / f"{os.getpid()}.json"
                temporary = path.with_suffix(".new")
                temporary.write_text(json.dumps(asdict(state.counts)))
                temporary.replace(path)


def _measure(cost: PartCost, bad: Sequence[str]) -> None:
    for name in ("documents", "tokens", "bytes"):
        _count(name, getattr(cost, name))
    _count("parts", 1)
    for code in bad:
        _count(f"bad_{code}", 1)
    for stage, seconds in cost.seconds.items():
        Metrics.distribution(NAMESPACE, f"{stage}_milliseconds").update(round(1000 * seconds))
        if seconds and cost.tokens:
            Metrics.distribution(NAMESPACE, f"{stage}_tokens_per_second").update(round(cost.tokens / seconds))


def _count(name: str, value: int) -> None:
    Metrics.counter(NAMESPACE, name).inc(value)


def total(folder: Path) -> Counts:
    """The counters of all workers, added up."""
    result = Counts()
    for path in folder.glob("*.json"):
        for name, value in json.loads(path.read_text()).items():
            setattr(result, name, getattr(result, name) + value)
    return result


def costs(folder: Path) -> list[PartCost]:
    """What each part that this run has finished took."""
    lines = [line for path in sorted(folder.glob("*.parts")) for line in path.read_text().splitlines()]
    return [PartCost(**json.loads(line)) for line in lines]


class _State:
    def __init__(self) -> None:
        self.counts, self.lock, self.written = Counts(), threading.Lock(), 0.0


_states: dict[str, _State] = {}
_watching: set[int] = set()


def _watch(launcher: int) -> None:
    if launcher in _watching:
        return
    _watching.add(launcher)

    def watch() -> None:
        while _alive(launcher):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher watch").start()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
