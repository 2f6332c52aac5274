"""`lacy status`: the progress of a run, on any runner, read from its dataset.

Each finished part leaves a record in DATASET/.parts; the times of the records give the pace. The planned parts follow
from the manifest and, for compressed files, from the lists of their pieces once they are cut.
"""

import json
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from lacy.pipeline.corpus.sources import SPOOL, Range, Stream, plan_parts
from lacy.pipeline.runners.counts import Counts
from lacy.schemas.files import folders, modified, read_bytes, read_many, sizes
from lacy.schemas.manifest import RECORDS, LabelSet, Manifest, PartRecord, label_sets, read_manifest, record_path

WINDOW = 600.0  # seconds that the pace is measured over
QUIET, PAUSES = 300.0, 10.0  # a run is stalled after this many seconds and this many of its usual pauses between parts
NAMED = 5  # unfinished parts that a stalled run may list by name


class Measured(NamedTuple):
    """The part of a record that progress needs."""

    rows: int
    tokens: int
    bad: int
    at: float  # when it was written, seconds since 1970


class Labels(BaseModel):
    name: str
    policy: str = ""
    budget: float | None = None
    share: float = 0.0
    parts: int = 0
    complete: bool = False


class Status(BaseModel):
    dataset: str
    state: Literal["none", "running", "complete"]
    parts: int = 0
    parts_planned: int | None = None  # excluding files that are not cut yet; None: unknown, because of --limit
    uncut: int = 0  # compressed files whose parts are not known yet
    documents: int = 0
    tokens: int = 0
    bad: int = 0
    corpus_bytes: int = 0  # compressed files count compressed
    corpus_bytes_done: int = 0
    share: float = 0.0  # of the run that is done, 0 to 1
    last_part: float | None = None  # when it was finished, seconds since 1970
    parts_per_second: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    stuck: list[str] = []  # one line each
    labels: list[Labels] = []


def status(dataset: Path, known: dict[str, Measured] | None = None, now: float | None = None) -> Status:
    """The progress of the run that writes a dataset.

    known: records by part from earlier calls; only new records are read, and added.

    Raises DatasetError for a manifest that is damaged, or a store that cannot be read.
    """
    if not modified(dataset, "manifest.json"):
        return Status(dataset=str(dataset), state="none")
    manifest = read_manifest(dataset)
    result = Status(
        dataset=str(dataset), state=manifest.state, corpus_bytes=sum(file.bytes for file in manifest.corpus)
    )
    if manifest.state == "complete":
        return result.model_copy(update=_complete(dataset, manifest))
    return result.model_copy(update=_running(dataset, manifest, known if known is not None else {}, now or time.time()))


def update(dataset: Path, known: dict[str, Measured]) -> list[str]:
    """Add the new records of a dataset to `known`; returns the names of damaged records."""
    times = {name.removesuffix(".json"): at for name, at in modified(dataset / RECORDS, "part-*.json").items()}
    for gone in known.keys() - times.keys():
        del known[gone]
    new = [name for name, at in times.items() if name not in known or known[name].at != at]
    damaged = []
    for name, data in zip(new, read_many([record_path(dataset, name) for name in new]), strict=True):
        try:
            record = PartRecord.model_validate_json(data)
        except ValidationError:
            damaged.append(name)
        else:
            known[name] = Measured(record.rows, record.tokens, record.bad, times[name])
    return damaged


def counter(dataset: Path, before: Set[str], bytes_of: dict[str, int]) -> Callable[[], Counts]:
    """A function that counts the parts finished from now on, by their records, and those cut from streams.

    before: parts that an earlier run finished
    bytes_of: corpus bytes of a part, where known
    """
    earlier = modified(dataset / RECORDS, "part-*.json")
    known = {name: Measured(0, 0, 0, at) for file, at in earlier.items() if (name := file[:-5]) in before}
    cut: set[str] = set()

    def count() -> Counts:
        update(dataset, known)
        copies = {name.partition(".")[0] for name in sizes(dataset / SPOOL, "part-*")}
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


def _complete(dataset: Path, manifest: Manifest) -> dict[str, object]:
    named = {record.name for record in manifest.parts if record.rows}
    sets = label_sets(dataset)
    labels = [_labels(found, named) for found in sets.values()]
    labels += [Labels(name=name) for name in folders(dataset / "labels") if name not in sets]
    return {
        "parts": len(manifest.parts),
        "parts_planned": len(manifest.parts),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "bad": manifest.bad,
        "corpus_bytes_done": sum(file.bytes for file in manifest.corpus),
        "share": 1.0,
        "labels": sorted(labels, key=lambda found: found.name),
    }


def _labels(found: LabelSet, named: set[str]) -> Labels:
    parts = {entry.name for entry in found.parts}
    return Labels(
        name=found.name,
        policy=found.policy,
        budget=found.budget,
        share=found.share,
        parts=len(parts),
        complete=parts == named,
    )


def _running(dataset: Path, manifest: Manifest, known: dict[str, Measured], now: float) -> dict[str, object]:
    damaged = update(dataset, known)
    planned, uncut = _planned(dataset, manifest)
    limit = manifest.options.get("limit")
    documents = sum(part.rows for part in known.values())
    sizes = {part.name: size for part, size in planned}
    done = sum(sizes.get(name, 0.0) for name in known)
    total = sum(file.bytes for file in manifest.corpus)
    share = min(1.0, documents / limit if limit else done / total if total else 0.0)
    times = sorted(part.at for part in known.values())
    recent = {name: part for name, part in known.items() if part.at > now - WINDOW}
    found: dict[str, object] = {
        "parts": len(known),
        "parts_planned": None if limit else len(planned),
        "uncut": len(uncut),
        "documents": documents,
        "tokens": sum(part.tokens for part in known.values()),
        "bad": sum(part.bad for part in known.values()),
        "corpus_bytes_done": round(done),
        "share": share,
        "last_part": times[-1] if times else None,
    }
    if len(recent) > 1:
        first = min(recent, key=lambda name: recent[name].at)
        seconds = max(now - recent.pop(first).at, 1e-3)  # in which the others were finished
        found["parts_per_second"] = len(recent) / seconds
        found["tokens_per_second"] = sum(part.tokens for part in recent.values()) / seconds
        gained = sum(part.rows / limit if limit else sizes.get(name, 0.0) / total for name, part in recent.items())
        if gained:
            found["seconds_left"] = (1 - share) * seconds / gained
    left = [] if limit or uncut else [part for part, _ in planned if part.name not in known]
    begun = max(modified(dataset, "manifest.json").values(), default=now)
    found["stuck"] = [*_damaged(damaged), *_still(times, begun, now, left, whole=share >= 1 and not uncut)]
    return found


def _planned(dataset: Path, manifest: Manifest) -> tuple[list[tuple[Range, float]], list[Stream]]:
    """The known parts with their corpus bytes, and the compressed files that are not cut yet."""
    bytes_of = {file.path: file.bytes for file in manifest.corpus}
    parts: list[tuple[Range, float]] = []
    streams = []
    for item in plan_parts(manifest.corpus, manifest.options["part_bytes"]):
        if isinstance(item, Range):
            parts.append((item, item.end - item.start))
        else:
            streams.append(item)
    lists = modified(dataset / SPOOL, "stream-*.json") if streams else {}
    uncut = []
    for stream in streams:
        name = f"stream-{stream.index:05d}.json"
        if name in lists:
            pieces = [Range(**fields) for fields in json.loads(read_bytes(dataset / SPOOL / name))]
            size = sum(piece.end - piece.start for piece in pieces) or 1
            parts += [(piece, (piece.end - piece.start) / size * bytes_of[stream.source]) for piece in pieces]
        else:
            uncut.append(stream)
    return parts, uncut


def _damaged(names: list[str]) -> Iterator[str]:
    if names:
        others = f" and {len(names) - 1:,} others are" if len(names) > 1 else " is"
        yield f"{RECORDS}/{names[0]}.json{others} damaged: remove them, and their parts are measured again"


def _still(times: list[float], begun: float, now: float, left: list[Range], *, whole: bool) -> Iterator[str]:
    """Lines about a stalled run. `times`: when its parts were finished, sorted."""
    if whole:
        yield "all parts are measured: if the run has ended, rerun the same lacy label command to complete the dataset"
        return
    usual = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    quiet = now - (times[-1] if times else begun)
    if quiet > max(QUIET, PAUSES * usual):
        minutes = f"{quiet / 60:,.0f} minutes"
        yield f"no part was finished for {minutes}: if the run has ended, rerun the same command to resume"
        if len(left) <= NAMED:
            yield from (f"left: {part.name} ({part.source}, bytes {part.start:,} to {part.end:,})" for part in left)
