"""`lacy label --estimate`: label a sample of a corpus, and extrapolate what the whole corpus takes.

The sample is evenly spaced pieces of the corpus, from a random start; a compressed file gives its first pieces, the
only ones that can be reached. Totals are ratios to the bytes of the sampled pieces; their intervals come from
resampling the pieces with replacement (the bootstrap).
"""

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lacy.pipeline.corpus import spool
from lacy.pipeline.corpus.sources import Range, Stream, default_part_bytes, find_files, part_name, plan_parts
from lacy.pipeline.decide import decide, require_policy
from lacy.pipeline.fold import fold
from lacy.pipeline.label import Run, begin, measure
from lacy.pipeline.options import LabelOptions, ModelSpec
from lacy.pipeline.placement import models_of
from lacy.pipeline.runners.counts import PartCost
from lacy.schemas.manifest import CorpusFile
from lacy.schemas.parts import to_parquet

PIECES = 24
CPU_PIECE_BYTES = 1 << 14  # some thousand tokens: a minute or two for the whole sample, on a laptop
DRAWS = 2000
CONFIDENCE = 0.9
Draws = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A total for the whole corpus, and its 90 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What labelling a whole corpus takes.

    stages  hours of work: of one core, or of one engine where the stage has engines
    hours   wall-clock hours with the workers and engines that the options ask for
    """

    corpus_bytes: Figure  # uncompressed
    documents: Figure
    tokens: Figure
    signals_bytes: Figure
    labels_bytes: Figure
    stages: dict[str, Figure]
    hours: Figure
    sample_tokens: int
    sample_documents: int
    workers: int
    engines: dict[str, int]  # by stage


def estimate(
    options: LabelOptions,
    policy: str = "lacy",
    budget: float | None = None,
    *,
    seed: int = 0,
    run: Run = Run(),  # noqa: B008
) -> Estimate:
    """Label a sample in a temporary folder; nothing is written to `options.out`.

    Raises what `lacy.pipeline.label.label` raises.
    """
    require_policy(options, policy, budget=budget)
    files = find_files(options.corpus)
    run.on_stage("finding models")
    tokenizer, specs = models_of(options)
    part_bytes = options.part_bytes or default_part_bytes(files)
    on_cpu = all(spec.backend == "transformers" and not spec.engines for spec in specs.values())
    piece = min(part_bytes, CPU_PIECE_BYTES) if on_cpu else part_bytes
    with tempfile.TemporaryDirectory(prefix="lacy-estimate-") as folder:
        dataset = Path(folder) / "sample"
        sizes = _uncompressed(files)
        total = sum(size.mean() for size in sizes.values())
        pieces = list(_sample(files, sizes, piece, dataset, seed))
        options = options.model_copy(update={"out": dataset, "part_bytes": piece})
        begin(options, files, tokenizer, specs)
        costs = measure(options, list(pieces), specs, run) or []
        fold(dataset, max_bad=1.0)
        decide(dataset, policy, budget=budget)
        signals, labels = (_bytes_per_token(dataset / kind) for kind in ("signals", f"labels/{policy}"))
    return _extrapolate(
        costs, np.sum(list(sizes.values()), axis=0), total, signals, labels, options.workers, specs, seed
    )


def _uncompressed(files: list[CorpusFile]) -> dict[str, Draws]:
    """Uncompressed bytes of each file, (DRAWS,) each: known, or drawn from the expansion of a few files."""
    streams = [item for item in plan_parts(files, 1 << 40) if isinstance(item, Stream)]
    known = {file.path: file.bytes for file in files}
    generator = random.Random(0)
    probed = generator.sample(streams, min(PIECES, len(streams)))
    expansion = np.array([spool.expansion(stream) for stream in probed])
    draw = np.random.default_rng(0)
    of_stream = {stream.source: ratio for stream, ratio in zip(probed, expansion, strict=True)}
    compressed = {stream.source for stream in streams}
    sizes = {}
    for path, size in known.items():
        if path not in compressed:
            ratio = np.ones(DRAWS)
        elif path in of_stream:
            ratio = np.full(DRAWS, of_stream[path])
        else:
            ratio = draw.choice(expansion, (DRAWS, len(expansion))).mean(1)
        sizes[path] = size * ratio
    return sizes


def _sample(files: list[CorpusFile], sizes: dict[str, Draws], piece: int, dataset: Path, seed: int) -> Iterator[Range]:
    """Evenly spaced pieces of the corpus, each once, in order."""
    planned = plan_parts(files, piece)
    total = sum(size.mean() for size in sizes.values())
    step = max(total / PIECES, piece)
    position = random.Random(seed).random() * step if total > PIECES * piece else 0.0
    wanted = np.arange(position, total, step)
    start = 0.0
    for index, file in enumerate(files):
        size = sizes[file.path].mean()
        inside = wanted[(wanted >= start) & (wanted < start + size)] - start
        pieces = [item for item in planned if (item.source == file.path)]
        if pieces and isinstance(pieces[0], Stream):
            yield from islice(spool.cut(pieces[0], dataset, piece, set()), len(inside))
        elif pieces and isinstance(pieces[0], Range) and pieces[0].format == "txt":
            yield from (item for item in pieces[: len(inside)] if isinstance(item, Range))
        else:
            for number in sorted({int(offset // piece) for offset in inside}):
                begin = number * piece
                end = min(begin + piece, file.bytes)
                first = pieces[0]
                assert isinstance(first, Range)
                yield replace(first, name=part_name(index, begin), start=begin, end=end)
        start += size


def _bytes_per_token(folder: Path) -> float:
    """Bytes per token of one part that holds the whole sample: single pieces are too small to compress well."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    whole = pa.concat_tables(tables).combine_chunks()
    return len(to_parquet(whole)) / max(1, len(whole["token_ids"].combine_chunks().flatten()))


def _extrapolate(
    costs: list[PartCost],
    corpus_bytes: Draws,
    total: float,
    signals: float,
    labels: float,
    workers: int,
    specs: dict[str, ModelSpec],
    seed: int,
) -> Estimate:
    stages = list(dict.fromkeys(stage for cost in costs for stage in cost.seconds))
    table = np.array(
        [
            [cost.bytes, cost.documents, cost.tokens, *(cost.seconds.get(stage, 0.0) for stage in stages)]
            for cost in sorted(costs, key=lambda cost: (cost.bytes, cost.tokens))
        ]
    )  # (pieces, columns)
    ratio = table.sum(0) / table[:, 0].sum()
    rng = np.random.default_rng(seed)
    drawn = table[rng.integers(0, len(table), (DRAWS, len(table)))].sum(1)  # (DRAWS, columns)
    spread = drawn / drawn[:, :1] - ratio
    seen = min(1.0, table[:, 0].sum() / total)  # share of the corpus whose counts are certain
    shrink = np.where(np.arange(table.shape[1]) < 3, np.sqrt(1 - seen), 1.0)
    draws = (ratio + spread * shrink) * corpus_bytes[:, None]
    values = ratio * total

    def figure(value: float, drawn: Draws) -> Figure:
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Figure(float(value), float(low), float(high))

    column = {name: 3 + index for index, name in enumerate(stages)}
    engines = {role: spec.engines for role, spec in specs.items() if spec.engines}
    on_engines = [column[stage] for stage in stages if stage in engines]
    by_workers = [column[stage] for stage in stages if stage not in engines]
    count = max(engines.values(), default=1)

    def wall(rows: Draws) -> Draws:
        """Seconds to hours; workers and engines work in parallel."""
        return np.maximum(rows[..., by_workers].sum(-1) / workers, rows[..., on_engines].sum(-1) / count) / 3600

    return Estimate(
        corpus_bytes=figure(total, corpus_bytes),
        documents=figure(values[1], draws[:, 1]),
        tokens=figure(values[2], draws[:, 2]),
        signals_bytes=figure(values[2] * signals, draws[:, 2] * signals),
        labels_bytes=figure(values[2] * labels, draws[:, 2] * labels),
        stages={stage: figure(values[at] / 3600, draws[:, at] / 3600) for stage, at in column.items()},
        hours=figure(float(wall(values)), wall(draws)),
        sample_tokens=int(table[:, 2].sum()),
        sample_documents=int(table[:, 1].sum()),
        workers=workers,
        engines=engines,
    )
