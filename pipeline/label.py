"""`lacy label`: plan a corpus into parts, measure those that are not finished, fold their records into the manifest.

A dataset is bound to what made it: the corpus files with their sizes, the options, tokenizers, models and versions.
The same command resumes an interrupted run, and repairs a complete dataset that lost parts; another one is refused.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lacy.labelers import tokenize
from lacy.labelers.llm import engines
from lacy.pipeline import placement
from lacy.pipeline.corpus import spool
from lacy.pipeline.corpus.readers import read
from lacy.pipeline.corpus.sources import Range, Stream, default_part_bytes, find_files, plan_parts
from lacy.pipeline.fold import clear, finished_parts, fold, lost_parts
from lacy.pipeline.identity import manifest_of, require_same
from lacy.pipeline.language import language_warning
from lacy.pipeline.options import DEFAULT_SPACY, LabelOptions, ModelSpec
from lacy.pipeline.runners.counts import Counts, PartCost
from lacy.pipeline.runners.presets import Cluster
from lacy.pipeline.status import counter
from lacy.pipeline.write import admit
from lacy.schemas.errors import DatasetError, RunError
from lacy.schemas.files import folders, is_remote, remove_temporary, sizes
from lacy.schemas.manifest import CorpusFile, Manifest, PartRecord, read_manifest, save

if TYPE_CHECKING:  # Beam takes seconds to import: a run with nothing to measure does without
    from lacy.pipeline.runners.heartbeat import Heartbeat

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Outlook:
    """What a run is about to do, known before the work begins."""

    parts: int  # planned so far; the parts of a compressed file are added when it is cut
    bytes: int
    finished: list[PartRecord]  # by an earlier run
    warning: str = ""  # about the corpus; one line


@dataclass(frozen=True)
class Run:
    """Where a run takes place and who hears of it. None of it decides a byte of the dataset.

    cluster: the machines, where it is not this one
    beam_options: Beam's own options; they may name another runner
    on_stage: called with what a stage of some seconds does ("loading spaCy")
    on_start, on_submit, on_progress: called with the outlook, the id of a submitted job, the counts so far
    wait, patience: of a run that is not on this machine (`pipeline.runners.submit.run`)
    debug: let workers write to stderr
    """

    cluster: Cluster | None = None
    beam_options: list[str] | None = None
    on_stage: Callable[[str], None] = lambda stage: None
    on_start: Callable[[Outlook], None] = lambda outlook: None
    on_submit: Callable[[str], None] | None = None
    on_progress: Callable[[Counts], None] | None = None
    wait: bool = True
    patience: float | None = None
    debug: bool = False


def label(options: LabelOptions, run: Run = Run()) -> Manifest:
    """Measure every document of the corpus and return the manifest of the finished dataset.

    The manifest of a run that is not waited for is still "running".

    Raises CorpusError, DatasetError, TokenizerError, ModelError, RunError: one line each.
    """
    files = find_files(options.corpus)
    options = options.model_copy(update={"part_bytes": options.part_bytes or default_part_bytes(files)})
    dataset = options.out
    if not is_remote(dataset) and dataset.exists() and not dataset.is_dir():
        raise DatasetError(f"{dataset} is a file: choose a folder with --out", usage=True)
    if not _begun(dataset) and any(not name.startswith(".") for name in [*sizes(dataset), *folders(dataset)]):
        raise DatasetError(
            f"{dataset} has files in it but is not a dataset: choose a new folder with --out", usage=True
        )
    with _locked(dataset):
        run.on_stage("finding models")
        tokenizer, specs = placement.models_of(options, run.cluster)
        manifest = begin(options, files, tokenizer, specs)
        fresh = {record.name for record in finished_parts(dataset)} if manifest.parts else set()
        lost = {record.name for record in lost_parts(dataset, manifest)} - fresh
        if manifest.state == "complete":
            if not lost:
                if fresh:  # a run measured parts meanwhile, or was stopped in `clear`
                    manifest = fold(dataset, options.max_bad)
                clear(dataset)
                return manifest
            manifest = manifest.model_copy(update={"state": "running"})  # until they are measured again
            open_for_writing(dataset, manifest, tokenizer)
        run.on_stage("planning")
        parts = plan(options, files)
        finished = [record for record in manifest.parts if record.name not in lost | fresh]
        try:
            costs = measure(options, parts, specs, run, finished)
        except RunError:
            # Two runs of one command may write to one store: the same bytes. The first to end removes the copies.
            if read_manifest(dataset).state != "complete":
                raise
            costs = []
        return read_manifest(dataset) if costs is None else fold(dataset, options.max_bad)


def begin(
    options: LabelOptions, files: list[CorpusFile], tokenizer: tokenize.TargetTokenizer, specs: dict[str, ModelSpec]
) -> Manifest:
    """Write the manifest of a new dataset, or return that of a dataset which the same command began."""
    dataset = options.out
    expected = manifest_of(options, files, tokenizer, specs)
    if not _begun(dataset):
        with contextlib.suppress(FileExistsError):  # another run was first: of the same command, or refused below
            save(dataset / "manifest.json", expected, create=True)
    begun = read_manifest(dataset)
    require_same(dataset, begun, expected)
    if begun.state != "complete":
        open_for_writing(dataset, begun, tokenizer)
    return begun


def open_for_writing(dataset: Path, manifest: Manifest, tokenizer: tokenize.TargetTokenizer) -> None:
    """Prepare a dataset for the workers of a run, which may be one that repairs it."""
    if read_manifest(dataset).state != manifest.state:
        save(dataset / "manifest.json", manifest)
    remove_temporary(dataset)
    tokenize.save(tokenizer, dataset / TOKENIZER)
    admit(dataset, manifest.fingerprint())


def plan(options: LabelOptions, files: list[CorpusFile]) -> list[Range | Stream]:
    """The parts of the corpus; with --limit, those of its first documents."""
    assert options.part_bytes is not None
    planned = plan_parts(files, options.part_bytes)
    return list(_limited(planned, options)) if options.limit else planned


def measure(
    options: LabelOptions,
    planned: list[Range | Stream],
    specs: dict[str, ModelSpec],
    run: Run,
    finished: list[PartRecord] | None = None,
) -> list[PartCost] | None:
    """Measure the parts that are not finished yet.

    finished: records that are in the manifest already

    Returns what each part took, which only local runs know, or None for a run that is not waited for.
    """
    assert options.part_bytes is not None
    dataset = options.out
    finished = (finished or []) + finished_parts(dataset)
    committed = frozenset(record.name for record in finished)
    ranges = [item for item in planned if isinstance(item, Range) and item.name not in committed]
    streams = [item for item in planned if isinstance(item, Stream) and not spool.is_measured(item, dataset, committed)]
    if not ranges and not streams:
        run.on_start(Outlook(0, 0, finished))
        return []
    run.on_stage("reading a sample of the corpus")
    warning = language_warning([*ranges, *streams])
    run.on_start(Outlook(len(ranges), sum(part.end - part.start for part in ranges), finished, warning))
    run.on_stage("loading Beam")
    from lacy.pipeline.graph import Work, build, for_other_folders
    from lacy.pipeline.runners import local, submit

    work = Work(
        dataset=dataset,
        run=read_manifest(dataset).fingerprint(),
        ranges=ranges,
        streams=streams,
        part_bytes=options.part_bytes,
        committed=committed,
        tokenizer=str(dataset / TOKENIZER),
        spacy=options.spacy,
        rule={"attributes": options.attributes, "headings": options.headings},
        alignment=options.align,
        models=specs,
        keep_text=options.text,
        without_torch=not specs and options.spacy == DEFAULT_SPACY,
        hints=run.cluster.hints() if run.cluster else {},
    )
    elsewhere = submit.elsewhere(run.beam_options)
    workers = options.workers if streams or elsewhere else min(options.workers, len(ranges))
    run.on_stage("loading spaCy")
    from lacy.pipeline.tagging import load_grammar

    load_grammar(options.spacy, work.without_torch)  # raises here when it is missing, not in a worker
    placement.require_servers(specs)

    def graph(pipeline: Any, heartbeat: "Heartbeat") -> None:
        build(pipeline, for_other_folders(work) if elsewhere else work, heartbeat)

    run.on_stage("loading models" if specs else "starting workers")
    if not elsewhere:
        return local.run(
            graph,
            workers=workers,
            beam_options=run.beam_options,
            on_progress=run.on_progress,
            on_end=lambda heartbeat: engines.stop(engines.run_folder(heartbeat.run)),
            debug=run.debug,
        )

    def complete() -> bool:
        names = committed | {record.name for record in finished_parts(dataset)}
        return {part.name for part in ranges} <= names and all(spool.is_measured(s, dataset, names) for s in streams)

    submit.run(
        graph,
        beam_options=run.beam_options or [],
        name=work.run[:16],
        count=counter(dataset, committed, {part.name: part.end - part.start for part in ranges}),
        complete=complete,
        on_submit=run.on_submit,
        on_progress=run.on_progress,
        wait=run.wait,
        patience=run.patience,
    )
    return [] if run.wait else None


def _limited(planned: list[Range | Stream], options: LabelOptions) -> Iterator[Range]:
    """The ranges that hold the first `limit` documents, each with its own limit."""
    assert options.limit is not None and options.part_bytes is not None
    left = options.limit
    for item in planned:
        parts = [item] if isinstance(item, Range) else spool.cut(item, options.out, options.part_bytes, set())
        for part in parts:
            count = len(read(replace(part, limit=left)).ids)
            yield replace(part, limit=left)
            left -= count
            if left <= 0:
                return


@contextlib.contextmanager
def _locked(dataset: Path) -> Iterator[None]:
    """One run at a time writes to a folder. A store has no locks: two runs there write the same bytes."""
    if is_remote(dataset):
        yield
        return
    dataset.mkdir(parents=True, exist_ok=True)
    lock = FileLock(dataset / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DatasetError(f"another run is writing to {dataset}: wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


def _begun(dataset: Path) -> bool:
    return "manifest.json" in sizes(dataset, "manifest.json")
