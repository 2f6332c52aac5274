"""Scaling of labelling with workers that have a GPU each: the real graph, with a scorer that sleeps instead of a GPU.

    python benchmarks/scale.py [CORPUS.jsonl[.gz]] [--parts N] [--workers N ...] [--gpu-times RATIO ...]

Reading, tokenising, spaCy and the grammar, Beam, writing and the records are real; the reference is a `Sleeper`, which
takes the time of a GPU with some tokens/s, and no core. The core time of a part is measured first, with a GPU that
takes no time; then for each RATIO the GPU takes RATIO times as long, and each of 1 to 4 workers labels N parts. Parts
are small (4 KiB of corpus, 1,000 tokens), so the fixed cost of a part weighs 250 times as much as in parts of a MiB.

tokens/s       of all workers while all of them work: without start-up and without waiting for the last
efficiency_n   tokens/s of n workers over n times those of one, at the first RATIO: 1 is linear scaling. There the GPU
               takes ten times as long as the cores, so that two cores can feed many workers: any loss is the graph's
bend           number of workers at which scaling must end: a worker keeps a core busy for 1/(1 + RATIO) of its time,
               so C cores are full with C * (1 + RATIO) workers, and tokens/s stay at what C cores can tag. The second
               RATIO puts it within reach. A GPU of R tokens/s needs R/T cores where one core tags T tokens/s
overhead_ms_per_part   time of a part with one worker that is neither GPU nor grammar: reading, tokenising, Beam,
               writing, the record; the table splits it up

With one worker the graph runs in this process, with more in processes of their own, which Beam reaches by gRPC.
The last line is one JSON object.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # workers import this file

from benchmarks.label import load, write  # noqa: E402  (sets one thread for each library)
from lacy.labelers import tokenize  # noqa: E402
from lacy.labelers.llm import model_folders  # noqa: E402
from lacy.labelers.llm.scorer import Scores  # noqa: E402
from lacy.pipeline.corpus.sources import Range, find_files, plan_parts  # noqa: E402
from lacy.pipeline.graph import Work, build  # noqa: E402
from lacy.pipeline.options import DEFAULT_REFERENCE, ModelSpec  # noqa: E402
from lacy.pipeline.runners import local  # noqa: E402
from lacy.pipeline.write import admit  # noqa: E402

PART_BYTES, PIECE = 4096, 1000  # bytes of a part, characters of a document
STAGES = ("read", "grammar", "reference", "write")
NO_TIME = 1e12  # tokens/s
MIN_CYCLES = 3


class Sleeper:
    """A scorer that takes as long as a GPU, and logs when it was called and with how many tokens."""

    path = "sleep"

    def __init__(self, tokens_per_second: float, log: str):
        self._rate, self._log = tokens_per_second, Path(log) / f"{os.getpid()}.asked"

    def score(self, documents: list[np.ndarray], on_tokens: Callable[[int], None] | None = None) -> list[Scores]:
        began = time.monotonic()
        tokens = sum(map(len, documents))
        with open(self._log, "a") as file:
            file.write(json.dumps([began, tokens]) + "\n")
        scores = [Scores(_noise(document), None) for document in documents]
        time.sleep(max(0.0, began + tokens / self._rate - time.monotonic()))
        if on_tokens:
            on_tokens(tokens)
        return scores


@dataclass(frozen=True)
class Rate:
    rate: float  # tokens/s of all workers
    seconds: dict[str, float]  # of one part, by stage
    beside: float  # seconds of one part outside the stages: Beam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--parts", type=int, default=10, help="parts of each worker")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--gpu-times", type=float, nargs="+", default=[10.0, 0.5], help="GPU time over core time")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # Beam's
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        ranges = parts(arguments.corpus, Path(folder), arguments.parts * max(*arguments.workers, 1))
        bare = run(ranges[: arguments.parts], 1, NO_TIME, Path(folder) / "bare")
        print(f"one core reads, tags and writes {bare.rate:,.0f} tokens/s; there are {cores}")
        efficiency: dict[int, float] = {}
        for ratio in arguments.gpu_times:
            gpu = bare.rate / ratio
            print(
                f"\nGPUs of {gpu:,.0f} tokens/s, {ratio:g} times the cores' time: "
                f"bend at {cores * (1 + ratio):.1f} workers"
            )
            print("workers  tokens/s  efficiency   ms of a part: " + "  ".join(f"{name:>9}" for name in STAGES))
            one = 0.0
            for count in arguments.workers:
                rate = run(ranges[: count * arguments.parts], count, gpu, Path(folder) / f"{ratio:g}-{count}")
                one = one or rate.rate / count
                share = rate.rate / (count * one)
                efficiency.setdefault(count, share)
                stages = "  ".join(f"{1000 * rate.seconds[name]:9,.0f}" for name in STAGES)
                print(f"{count:7}  {rate.rate:8,.0f}  {share:10.3f}  {'':15}{stages}", flush=True)
    result = {f"efficiency_{count}": round(share, 3) for count, share in efficiency.items() if count > 1}
    overhead = bare.seconds["read"] + bare.seconds["write"] + bare.beside
    print(
        f"\nof a part, beside GPU and grammar: {1000 * overhead:.1f} ms, {1000 * bare.beside:.1f} of them in no stage"
    )
    print(json.dumps(result | {"overhead_ms_per_part": round(1000 * overhead, 1)}))


def parts(corpus: Path | None, folder: Path, count: int) -> list[Range]:
    """`count` ranges of about PART_BYTES, with documents of PIECE characters."""
    need, texts = count * PART_BYTES, []
    for row in load(corpus, need // 100):
        text = row["text"]
        texts += [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
        need -= len(text)
        if need < 0:
            break
    file = write(folder / "corpus.jsonl", [{"id": str(number), "text": text} for number, text in enumerate(texts)])
    ranges = plan_parts(find_files([str(file)]), PART_BYTES)
    if len(ranges) < count:
        sys.exit(f"the corpus has {len(ranges)} parts of {PART_BYTES} bytes, and {count} are needed: --parts")
    return [part for part in ranges if isinstance(part, Range)]


def run(ranges: list[Range], workers: int, gpu: float, folder: Path) -> Rate:
    """Label `ranges` with workers that have a GPU of so many tokens/s each."""
    dataset, log = folder / "dataset", folder / "asked"
    log.mkdir(parents=True)
    tokenize.save(tokenize.load(model_folders.resolve(DEFAULT_REFERENCE)), dataset / "tokenizer")
    admit(dataset, "run")
    spec = ModelSpec(
        role="reference",
        model="sleeper",
        backend="transformers",
        factory="benchmarks.scale:Sleeper",
        arguments={"tokens_per_second": gpu, "log": str(log)},
    )
    work = Work(
        dataset=dataset,
        run="run",
        ranges=ranges,
        streams=[],
        part_bytes=PART_BYTES,
        committed=frozenset(),
        tokenizer=str(dataset / "tokenizer"),
        spacy="en_core_web_sm",
        rule={"attributes": False, "headings": False},
        alignment="first",
        models={"reference": spec},
        keep_text=True,
    )
    costs = local.run(lambda pipeline, heartbeat: build(pipeline, work, heartbeat), workers=workers)
    asked = [[json.loads(line) for line in path.read_text().splitlines()] for path in log.iterdir()]
    seconds = {name: statistics.median(cost.seconds[name] for cost in costs) for name in STAGES}
    # From one scoring to the next: the score and the write of one part, the reading and grammar of another.
    known = [
        before.seconds["reference"] + before.seconds["write"] + after.seconds["read"] + after.seconds["grammar"]
        for before, after in pairwise(costs)
    ]
    beside = [after[0] - before[0] - time for (before, after), time in zip(pairwise(asked[0]), known, strict=False)]
    return Rate(pace(asked), seconds, statistics.median(beside) if workers == 1 else float("nan"))


def pace(workers: list[list[tuple[float, int]]]) -> float:
    """Tokens/s of all workers, while all of them work: of each, when its scorer was asked and for how many tokens."""
    begin, end = max(times[0][0] for times in workers), min(times[-1][0] for times in workers)
    rate = 0.0
    for times in workers:
        inside = [one for one in times if begin <= one[0] <= end]
        if len(inside) < MIN_CYCLES + 1:
            sys.exit(f"the workers were at work together for fewer than {MIN_CYCLES} parts each: more --parts")
        rate += sum(tokens for _, tokens in inside[:-1]) / (inside[-1][0] - inside[0][0])
    return rate


def _noise(document: np.ndarray) -> np.ndarray:
    """Losses that compress as badly as real ones."""
    nll = np.random.default_rng(0).exponential(3.0, document.size).astype(np.float32)
    nll[:1] = np.nan
    return nll


if __name__ == "__main__":
    main()
