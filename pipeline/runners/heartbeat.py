"""What the workers of a run tell of their work.

On any runner: Beam's metrics, in the namespace NAMESPACE, and for each finished part a line of JSON in the log. On
this machine besides, where Beam's metrics arrive only when the run ends: each worker keeps a small file of counters,
which the launcher adds up. Neither a name nor a line holds a word of a document.
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

from lacy.pipeline.corpus.readers import Bad

log = logging.getLogger(__name__)

NAMESPACE = "lacy"
INTERVAL = 0.5
REASONS = {  # why a record is bad: what the reason has in it, and the name of its counter
    "not JSON": "not_json",
    "not an object": "not_an_object",
    "UTF-8": "not_utf8",
    "Unicode": "not_utf8",
    "longer than": "too_long",
    "stream breaks off": "broken_stream",
    "cannot read": "unreadable",
    "no text": "no_text",
    "text is empty": "empty",
    "text is": "text_of_another_type",
    "id is": "bad_id",
    "id occurs before": "duplicate",
    "engine dies of it": "kills_engine",
}


@dataclass
class Counts:
    documents: int = 0
    tokens: int = 0  # of finished parts
    scored: int = 0  # of the part in hand
    parts: int = 0
    bad: int = 0
    bytes: int = 0  # of the corpus ranges of finished parts
    planned_parts: int = 0  # found while a stream was cut
    planned_bytes: int = 0
    restarts: int = 0  # of engines that died


@dataclass(frozen=True)
class PartCost:
    """What a finished part took."""

    bytes: int  # of the corpus
    documents: int
    tokens: int
    seconds: dict[str, float]  # of work, by stage


@dataclass(frozen=True)
class Heartbeat:
    """Where this run's workers report; `folder` is None on runners that share no disk with the launcher."""

    folder: str | None
    run: str  # a name that no other run has
    launcher: int = 0  # process id

    def start(self) -> None:
        """Called once in each worker: end it when the launcher is gone."""
        if self.folder and self.launcher not in (0, os.getpid()):
            _watch(self.launcher)

    def scored(self, tokens: int) -> None:
        """More tokens of the part in hand have a score."""
        self._change(lambda counts: setattr(counts, "scored", counts.scored + tokens))

    def planned(self, parts: int, size: int) -> None:
        def change(counts: Counts) -> None:
            counts.planned_parts += parts
            counts.planned_bytes += size

        self._change(change)

    def restarted(self) -> None:
        """An engine died and was started again."""
        _count("engine_restarts", 1)
        log.warning(json.dumps({"event": "engine restarted"}))
        self._change(lambda counts: setattr(counts, "restarts", counts.restarts + 1), now=True)

    def finished(self, part: str, cost: PartCost, bad: Sequence[Bad]) -> None:
        """The part in hand is on disk, and so are its bad records."""
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


def reason_of(letter: Bad) -> str:
    """Of a few names, the one for why a record is bad."""
    return next((name for words, name in REASONS.items() if words in letter.reason), "other")


def _measure(cost: PartCost, bad: Sequence[Bad]) -> None:
    for name in ("documents", "tokens", "bytes"):
        _count(name, getattr(cost, name))
    _count("parts", 1)
    for letter in bad:
        _count(f"bad_{reason_of(letter)}", 1)
    for stage, seconds in cost.seconds.items():
        Metrics.distribution(NAMESPACE, f"{stage}_milliseconds").update(round(1000 * seconds))
        if seconds and cost.tokens:
            Metrics.distribution(NAMESPACE, f"{stage}_tokens_per_second").update(round(cost.tokens / seconds))


def _count(name: str, value: int) -> None:
    Metrics.counter(NAMESPACE, name).inc(value)


def total(folder: Path) -> Counts:
    """The sum over all workers."""
    result = Counts()
    for path in folder.glob("*.json"):
        for name, value in json.loads(path.read_text()).items():
            setattr(result, name, getattr(result, name) + value)
    return result


def costs(folder: Path) -> list[PartCost]:
    """Of all parts that this run has finished."""
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
