"""Speed of labelling: ratios against named baselines, measured in one run on this machine.

    python benchmarks/label.py [CORPUS.jsonl[.gz]] [--documents N] [--scored N] [--rounds N]

grammar_vs_bare          tokens/s of `lacy label --reference none --workers 1` (read, tokenise, parse, rule, align,
                         write), over those of a bare loop over nlp.pipe: same texts, same components
two_workers              tokens/s of `lacy label` with two workers over those with one; grammar and reference
scorer_vs_plain          tokens/s of the transformers scorer over those of a plain loop of model(**batch): documents
                         in corpus order, eight in a batch, padded, and log_softmax over all logits
labels_bytes_per_token   size of labels/lacy over its tokens
signals_bytes_per_token  size of signals over its tokens, with --no-text

Start-up (imports, loading models) is excluded: the clock of a run starts when each worker has finished its first
part. Each ratio is the median over rounds that alternate between the two sides. Without CORPUS: the sample that
`make demo` downloads. The last line is one JSON object.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ |= ONE_THREAD | {"TOKENIZERS_PARALLELISM": "false"}  # before NumPy and torch are imported

import numpy as np  # noqa: E402

from lacy.labelers import grammar, tokenize  # noqa: E402
from lacy.labelers.llm import model_folders  # noqa: E402
from lacy.labelers.llm.load import scorer as load_scorer  # noqa: E402

PLAIN_BATCH = 8  # documents
LACY = Path(sys.executable).with_name("lacy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--documents", type=int, default=500, help="for the grammar")
    parser.add_argument("--scored", type=int, default=100, help="for the reference and the sizes")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = load(arguments.corpus, max(arguments.documents, arguments.scored))
    with tempfile.TemporaryDirectory() as folder:
        many = write(Path(folder) / "many.jsonl", rows[: arguments.documents])
        few = write(Path(folder) / "few.jsonl", rows[: arguments.scored])
        result = {
            "grammar_vs_bare": grammar_vs_bare(many, rows[: arguments.documents], Path(folder), arguments.rounds),
            "scorer_vs_plain": scorer_vs_plain(rows[: arguments.scored], arguments.rounds),
            "two_workers": two_workers(few, Path(folder), arguments.rounds),
            **sizes(few, Path(folder)),
        }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


def load(corpus: Path | None, count: int) -> list[dict[str, str]]:
    if corpus is not None:
        data = corpus.read_bytes()
        lines = (gzip.decompress(data) if corpus.suffix == ".gz" else data).splitlines()
        return [{key: row[key] for key in ("id", "text")} for row in map(json.loads, lines[:count])]
    from lacy.demo import SAMPLE
    from lacy.pipeline.corpus.readers import read
    from lacy.pipeline.corpus.sources import Range

    if not SAMPLE.exists():
        sys.exit("no corpus: name one, or run `make demo` first")
    texts = read(Range("sample", str(SAMPLE), str(SAMPLE), "xml", 0, SAMPLE.stat().st_size)).texts
    pieces = [text[start : start + 1000] for text in texts for start in range(0, len(text), 1000)]
    return [{"id": str(number), "text": piece} for number, piece in enumerate(pieces[:count])]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def label(corpus: Path, out: Path, workers: int, *options: str) -> float:
    """Tokens/s, counted from when each worker has finished its first part."""
    size = max(1024, corpus.stat().st_size // (20 * workers))
    command = [LACY, "label", corpus, "--out", out, "--workers", workers, "--part-bytes", size, *options]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    manifest = json.loads((out / "manifest.json").read_text())
    done = sorted(
        ((out / "signals" / f"{part['name']}.parquet").stat().st_mtime, part["tokens"])
        for part in manifest["parts"]
        if part["rows"]
    )
    return sum(tokens for _, tokens in done[workers:]) / (done[-1][0] - done[workers - 1][0])


def grammar_vs_bare(corpus: Path, rows: list[dict[str, str]], folder: Path, rounds: int) -> float:
    nlp = grammar.load_pipeline()
    texts = [row["text"] for row in rows]
    target = tokenize.load(model_folders.resolve("smollm2-135m"))
    tokens = len(tokenize.encode(target, texts).ids)
    ratios = []
    for number in range(rounds):
        began = time.perf_counter()
        for _ in nlp.pipe(texts):
            pass
        bare = tokens / (time.perf_counter() - began)
        out = folder / f"grammar-{number}"
        ours = label(corpus, out, 1, "--reference", "none", "--tokenizer", target.name, "--policy", "factual")
        print(f"grammar: pipeline {ours:,.0f} tokens/s, bare nlp.pipe {bare:,.0f}", flush=True)
        ratios.append(ours / bare)
    return statistics.median(ratios)


def scorer_vs_plain(rows: list[dict[str, str]], rounds: int) -> float:
    model = model_folders.resolve("smollm2-135m")
    tokens = tokenize.encode(tokenize.load(model), [row["text"] for row in rows])
    documents = [ids[:2048] for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
    scorer = load_scorer("transformers", model, dtype="float32", device="cpu")
    plain = plain_loop(model)
    total = sum(map(len, documents))
    ratios = []
    for _ in range(rounds):
        seconds = []
        for score in (plain, scorer.score):
            began = time.perf_counter()
            score(documents)
            seconds.append(time.perf_counter() - began)
        print(f"scorer: {total / seconds[1]:,.0f} tokens/s, plain loop {total / seconds[0]:,.0f}", flush=True)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def plain_loop(model: str):
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.set_num_threads(1)

    @torch.inference_mode()
    def score(documents: list[np.ndarray]) -> None:
        for start in range(0, len(documents), PLAIN_BATCH):
            batch = documents[start : start + PLAIN_BATCH]
            ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, tokens in enumerate(batch):
                ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
                mask[row, : len(tokens)] = 1
            logprobs = torch.log_softmax(network(input_ids=ids, attention_mask=mask).logits[:, :-1], -1)
            logprobs.gather(-1, ids[:, 1:, None])

    return score


def two_workers(corpus: Path, folder: Path, rounds: int) -> float:
    ratios = []
    for number in range(rounds):
        one, two = (label(corpus, folder / f"workers-{count}-{number}", count) for count in (1, 2))
        print(f"workers: two {two:,.0f} tokens/s, one {one:,.0f}", flush=True)
        ratios.append(two / one)
    return statistics.median(ratios)


def sizes(corpus: Path, folder: Path) -> dict[str, float]:
    """Bytes per token of parts of the default size for a large corpus."""
    out = folder / "sizes"
    command = [LACY, "label", corpus, "--out", out, "--no-text", "--part-bytes", 1 << 20, "--workers", 1]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    tokens = json.loads((out / "manifest.json").read_text())["tokens"]
    ratios = {}
    for name, part in (("labels", "labels/lacy"), ("signals", "signals")):
        size = sum(path.stat().st_size for path in (out / part).glob("*.parquet"))
        ratios[f"{name}_bytes_per_token"] = size / tokens
    return ratios


if __name__ == "__main__":
    main()
