"""How fast a dataset answers: `lacy stats` and a look-up, on a generated dataset.

    python benchmarks/stats.py [--tokens N] [--folder DIR] [--rounds N]

stats_vs_duckdb   seconds of `lacy stats` over those of bare DuckDB over the same columns of the same files: tokens
                  grouped by part of speech, entity type, verdict and labels, with sums of their losses; quantiles of
                  the losses; words of the text, split at spaces, counted. Each is a process of its own
stats_seconds     of the whole command
lookup_seconds    to connect and read the tokens of one document
peak_gb           memory of `lacy stats`, the most that was resident

The dataset has two label sets, losses, and text of made-up words. With --folder it is kept, and used again. Figures are
the median of the rounds, which alternate between the two sides. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path[0] = str(Path(__file__).parent.parent)  # in place of this folder, where this file hides the package stats

import lacy  # noqa: E402
from lacy.schemas import manifest, parts  # noqa: E402
from lacy.schemas.codes import ENT_TYPES, POS  # noqa: E402
from lacy.schemas.files import sha256, write_atomic  # noqa: E402
from lacy.schemas.manifest import LabelRecord, LabelSet, Manifest, PartRecord  # noqa: E402

LACY = Path(sys.executable).with_name("lacy")
DOCUMENTS = 500  # in a part
WORDS = 300  # in a document, on average
VOCABULARY = 100_000
THRESHOLDS = {"lacy": 4.0, "loss": 6.5}  # nats

BARE = """
import duckdb, sys
folder = sys.argv[1]
connection = duckdb.connect()
signals = f"read_parquet('{folder}/signals/*.parquet', filename = true)"
labels = f"SELECT doc_id, label FROM read_parquet('{folder}/labels/{{0}}/*.parquet')"
connection.execute(f'''
SELECT pos, ent_type, factual, lacy, loss, count(*), count(nll), sum(nll) FROM (
    SELECT unnest(pos) AS pos, unnest(ent_type) AS ent_type, unnest(factual) AS factual, unnest(ref_nll) AS nll,
        unnest(lacy.label) AS lacy, unnest(loss.label) AS loss
    FROM {signals}
    JOIN ({labels.format("lacy")}) AS lacy USING (doc_id) JOIN ({labels.format("loss")}) AS loss USING (doc_id)
) GROUP BY ALL''').fetchall()
connection.execute(f'''
SELECT factual, quantile_cont(nll, [0.05, 0.25, 0.5, 0.75, 0.95])
FROM (SELECT unnest(factual) AS factual, unnest(ref_nll) AS nll FROM {signals}) GROUP BY ALL''').fetchall()
connection.sql(rf'''
SELECT word, count(*) FROM (SELECT unnest(string_split_regex(text, '\\s+')) AS word FROM {signals}) GROUP BY ALL
''').to_arrow_table()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=100e6)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "dataset"
        if not (folder / "manifest.json").exists():
            generate(folder, arguments.tokens)
        print(f"{manifest.read_complete(folder).tokens:,} tokens", flush=True)
        ours, bare, peaks, lookups = [], [], [], []
        for _ in range(arguments.rounds):
            seconds, peak = run([str(LACY), "stats", str(folder), "--json"])
            ours.append(seconds)
            peaks.append(peak)
            bare.append(run([sys.executable, "-c", BARE, str(folder)])[0])
            lookups.append(look_up(folder))
            print(
                f"stats {ours[-1]:.1f} s, {peak:.2f} GB; bare {bare[-1]:.1f} s; look-up {lookups[-1]:.2f} s", flush=True
            )
    result = {
        "stats_vs_duckdb": statistics.median(a / b for a, b in zip(ours, bare, strict=True)),
        "stats_seconds": statistics.median(ours),
        "lookup_seconds": statistics.median(lookups),
        "peak_gb": max(peaks),
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


def run(command: list[str]) -> tuple[float, float]:
    """Seconds, and the peak of resident memory in GB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def look_up(folder: Path) -> float:
    number = len(manifest.read_complete(folder).parts) * DOCUMENTS // 2
    began = time.perf_counter()
    with lacy.connect(folder) as connection:
        rows = connection.execute("SELECT * FROM tokens WHERE doc_id = ?", [name(number)]).fetchall()
    assert rows
    return time.perf_counter() - began


def generate(folder: Path, tokens: float) -> None:
    """A dataset of about so many tokens, the same each time."""
    count = max(1, round(tokens / (DOCUMENTS * WORDS * 1.62)))
    with ProcessPoolExecutor() as pool:
        records = list(pool.map(partial(part, folder), range(count)))
    total = sum(record.tokens for record, _ in records)
    for labels, threshold in THRESHOLDS.items():
        decided = [made[labels] for _, made in records]
        chosen = sum(record.delegated for record in decided)
        made = LabelSet(
            name=labels,
            policy=labels,
            action="delegate",
            budget=None,
            seed=0,
            threshold=threshold,
            candidates=sum(record.candidates for record in decided),
            tokens=total,
            chosen=chosen,
            share=chosen / total,
            parts=decided,
        )
        manifest.save(folder / "labels" / labels / "_policy.json", made)
    whole = Manifest(
        state="complete",
        corpus=[],
        options={},
        tokenizer={},
        models={},
        versions={},
        documents=sum(record.rows for record, _ in records),
        tokens=total,
        factual=sum(record.factual for record, _ in records),
        parts=[record for record, _ in records],
    )
    manifest.save(folder / "manifest.json", whole)


def name(document: int) -> str:
    return f"{document * 2654435761 % 2**32:08x}-{document}"  # in no order


@cache
def vocabulary() -> dict[str, Any]:
    """Words of 2 to 10 letters, each with the space before it, of 1 to 3 tokens; frequent as Zipf says."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 11, VOCABULARY)
    ends = np.cumsum(lengths)
    weights = np.arange(26, 0, -1.0)
    letters = "".join(draw.choice(list("etaoinshrdlucmfwypvbgkqjxz"), int(lengths.sum()), p=weights / weights.sum()))
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    return {
        "words": [f" {letters[end - length : end]}" for end, length in zip(ends, lengths, strict=True)],
        "characters": lengths + 1,
        "tokens": np.minimum(lengths, draw.choice([1, 2, 3], VOCABULARY, p=[0.55, 0.3, 0.15])),
        "cumulated": np.cumsum(frequency / frequency.sum()),
        "pos": draw.integers(1, len(POS), VOCABULARY),
        "ent_type": np.where(draw.random(VOCABULARY) < 0.3, draw.integers(1, len(ENT_TYPES), VOCABULARY), 0),
    }


def part(folder: Path, number: int) -> tuple[PartRecord, dict[str, LabelRecord]]:
    known, draw = vocabulary(), np.random.default_rng([1, number])
    counts = draw.integers(WORDS // 4, WORDS * 7 // 4, DOCUMENTS)  # words of each document
    words = np.searchsorted(known["cumulated"], draw.random(counts.sum())).clip(0, VOCABULARY - 1)
    first = np.cumsum(counts) - counts
    characters, pieces = known["characters"][words], known["tokens"][words]
    begin = np.cumsum(characters) - characters
    begin -= np.repeat(begin[first], counts)  # in the document
    word = np.repeat(np.arange(len(words)), pieces)  # of each token
    piece = np.arange(len(word)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = begin[word] + characters[word] * piece // pieces[word]
    ends = begin[word] + characters[word] * (piece + 1) // pieces[word]
    offsets = np.concatenate(([0], np.cumsum(np.add.reduceat(pieces, first)))).astype(np.int32)
    ent_type = known["ent_type"][words][word]
    factual = (ent_type > 0) & (draw.random(len(word)) < 0.7)
    nll = draw.gamma(1.2, 2.5, len(word)).astype(np.float32)
    unscored = np.zeros(len(word), np.bool_)
    unscored[offsets[:-1]] = True

    def lists(values: Any, kind: pa.DataType, mask: Any = None) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind, mask=mask))

    chosen = {
        "lacy": factual & ~unscored & (nll >= THRESHOLDS["lacy"]),
        "loss": ~unscored & (nll >= THRESHOLDS["loss"]),
    }
    columns: dict[str, Any] = {
        "doc_id": [name(number * DOCUMENTS + row) for row in range(DOCUMENTS)],
        "source": [f"made-{number % 8}.jsonl:{row}" for row in range(DOCUMENTS)],
        "text": ["".join(known["words"][of] for of in words[a : a + n]) for a, n in zip(first, counts, strict=True)],
        "token_ids": lists((words[word] * 3 + piece) % 32_000, pa.int32()),
        "token_starts": lists(starts, pa.int32()),
        "token_ends": lists(ends, pa.int32()),
        "factual": lists(factual, pa.bool_()),
        "pos": lists(known["pos"][words][word], pa.uint8()),
        "ent_type": lists(ent_type, pa.uint8()),
        "ref_nll": lists(nll, pa.float32(), unscored),
    }
    called = f"part-{number:05d}-{0:015d}"
    data = save(manifest.signals_path(folder, called), parts.select(parts.SIGNALS, ["text"]), columns)
    record = PartRecord(
        name=called,
        source="made",
        rows=DOCUMENTS,
        tokens=len(word),
        factual=int(factual.sum()),
        bad=0,
        bytes=len(data),
        sha256=sha256(data),
    )
    decided = {}
    for labels, which in chosen.items():
        columns["label"] = lists(which.astype(np.int8), pa.int8())
        data = save(manifest.labels_path(folder, labels, called), parts.select(parts.LABELS, []), columns)
        decided[labels] = LabelRecord(
            name=called,
            rows=DOCUMENTS,
            tokens=len(word),
            candidates=int(which.sum()),
            delegated=int(which.sum()),
            ignored=0,
            lowest=THRESHOLDS[labels],
            bytes=len(data),
            sha256=sha256(data),
        )
    return record, decided


def save(path: Path, schema: pa.Schema, columns: dict[str, Any]) -> memoryview:
    data = memoryview(parts.to_parquet(pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)))
    write_atomic(path, data)
    return data


if __name__ == "__main__":
    main()
