"""How much of an engine's speed the scorers keep: ratios against named baselines, measured in one run.

    python benchmarks/score.py [CORPUS.jsonl[.gz]] [--model M] [--documents N] [--rounds N] [--only NAME ...]

vllm_vs_bare          tokens/s of the vllm scorer, in an engine process as `lacy label` runs it, over those of a bare
                      LLM.generate in the same engine: same prompts, same sampling parameters
vllm_vs_beam_handler  over those of Beam's VLLMCompletionsModelHandler, asked for the same prompt logprobs: its server
                      has the same engine options, and gets all prompts in one batch
server_vs_vllm        tokens/s of the server scorer on `vllm serve` with the same engine options, over the vllm scorer's
overlap               seconds of `lacy label` with grammar and scoring, two workers and one engine, over those of the
                      slower of the two alone: grammar with one worker, scoring on one engine. With --overlap-model,
                      else a Llama with random weights, of a size that makes the two about as slow as each other

Start-up is left out everywhere. Each ratio is the median over rounds that alternate between the two sides. Without
CORPUS: the sample that `make demo` fetched. The last line is one JSON object.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
os.environ |= THREADS | QUIET | {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import httpx  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))  # the process of an engine imports this file

from benchmarks.label import label, load, write  # noqa: E402
from lacy.labelers import tokenize  # noqa: E402
from lacy.labelers.llm import model_folders  # noqa: E402
from lacy.labelers.llm.engines import Engines, EngineScorer, EngineSpec, run_folder, stop  # noqa: E402
from lacy.labelers.llm.scorer import plan_spans  # noqa: E402
from lacy.labelers.llm.server_scorer import ServerScorer  # noqa: E402
from lacy.labelers.llm.vllm_scorer import VllmScorer  # noqa: E402

NAMES = ("vllm_vs_bare", "vllm_vs_beam_handler", "server_vs_vllm", "overlap")
CONTEXT, BATCH_TOKENS = 1024, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--overlap-model")
    parser.add_argument("--documents", type=int, default=40, help="to score")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    arguments = parser.parse_args()
    rows = load(arguments.corpus, 2000)
    model = model_folders.resolve(arguments.model)
    tokens = tokenize.encode(tokenize.load(model), [row["text"] for row in rows[: arguments.documents]])
    documents = [ids[: CONTEXT - 1] for ids in np.split(tokens.ids, tokens.offsets[1:-1])]
    print(f"{len(documents)} documents, {sum(map(len, documents)):,} tokens", flush=True)
    result = {}
    if "vllm_vs_bare" in arguments.only:
        result["vllm_vs_bare"] = vllm_vs_bare(model, documents, arguments.rounds)
    if "vllm_vs_beam_handler" in arguments.only:
        result["vllm_vs_beam_handler"] = vllm_vs_beam_handler(model, documents, arguments.rounds)
    if "server_vs_vllm" in arguments.only:
        result["server_vs_vllm"] = server_vs_vllm(model, documents, arguments.rounds)
    if "overlap" in arguments.only:
        result["overlap"] = overlap(rows, arguments.overlap_model, arguments.rounds)
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


class Measured(VllmScorer):
    """The vllm scorer, and beside it what it is measured against, on the same engine."""

    def bare(self, documents: list[np.ndarray], **_: Any) -> list[float]:
        """Seconds that the engine takes for the prompts that `score` would give it, for each document alike."""
        spans = plan_spans(documents, [None] * len(documents), self.window, self.overlap, self.bos)
        prompts = [self._prompt(documents[span.document], span) for span in spans]
        began = time.perf_counter()
        self._generate(prompts)
        return [time.perf_counter() - began] * len(documents)


def vllm_vs_bare(model: str, documents: list[np.ndarray], rounds: int) -> float:
    with vllm_engine(model) as engines:
        scorer = EngineScorer(engines)
        print(f"engine: {scorer.path}", flush=True)

        def bare() -> float:
            return engines.run("bare", documents)[0]

        return ratio("vllm", lambda: timed(scorer.score, documents), "bare", bare, documents, rounds)


def vllm_vs_beam_handler(model: str, documents: list[np.ndarray], rounds: int) -> float:
    from apache_beam.ml.inference.vllm_inference import VLLMCompletionsModelHandler

    options = {name.removeprefix("--"): value and str(value) for name, value in server_options()}
    handler = VLLMCompletionsModelHandler(model, vllm_server_kwargs=options)
    arguments = {"max_tokens": 1, "temperature": 0, "extra_body": {"prompt_logprobs": 0}}
    prompts = [document.tolist() for document in documents if len(document) > 1]
    with vllm_engine(model) as engines:
        server = handler.load_model()
        try:
            theirs = lambda: timed(handler.run_inference, prompts, server, arguments)  # noqa: E731
            ours = lambda: timed(EngineScorer(engines).score, documents)  # noqa: E731
            return ratio("vllm", ours, "Beam's handler", theirs, documents, rounds)
        finally:
            server._server_process.terminate()


def server_vs_vllm(model: str, documents: list[np.ndarray], rounds: int) -> float:
    with vllm_engine(model) as engines, vllm_server(model) as url:
        scorer = ServerScorer(model, servers=[url], window=CONTEXT - 1)
        ours = lambda: timed(scorer.score, documents)  # noqa: E731
        theirs = lambda: timed(EngineScorer(engines).score, documents)  # noqa: E731
        try:
            return ratio("server", ours, "vllm", theirs, documents, rounds)
        finally:
            scorer.close()


def overlap(rows: list[dict[str, str]], model: str | None, rounds: int) -> float:
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder) / "corpus.jsonl", rows[:600])
        model = model_folders.resolve(model) if model else random_llama(Path(folder) / "model")
        tokens = tokenize.encode(tokenize.load(model), [row["text"] for row in rows[:600]])
        documents = np.split(tokens.ids, tokens.offsets[1:-1])
        arguments = {"backend": "transformers", "model": model, "device": "cpu"}
        for number in range(rounds):
            alone = ("--reference", "none", "--tokenizer", model, "--policy", "none")
            seconds = {"grammar": len(tokens.ids) / label(corpus, Path(folder) / f"grammar-{number}", 1, *alone)}
            with engines_of("lacy.labelers.llm.load:scorer", arguments) as engines:
                seconds["scoring"] = timed(EngineScorer(engines).score, documents)
            both = ("--reference", model, "--scorer", "transformers", "--engines", 1, "--policy", "none")
            together = len(tokens.ids) / label(corpus, Path(folder) / f"both-{number}", 2, *map(str, both))
            print(f"overlap: {seconds['grammar']:.1f} s grammar, {seconds['scoring']:.1f} s scoring", end="")
            print(f", {together:.1f} s together", flush=True)
            ratios.append(together / max(seconds.values()))
    return statistics.median(ratios)


def ratio(
    ours: str,
    one: Callable[[], float],
    theirs: str,
    other: Callable[[], float],
    documents: list[np.ndarray],
    rounds: int,
) -> float:
    """Median of the speed of `one` over that of `other`, both warmed up."""
    tokens = sum(map(len, documents))
    one(), other()
    ratios = []
    for _ in range(rounds):
        mine, yours = one(), other()
        print(f"{ours} {tokens / mine:,.0f} tokens/s, {theirs} {tokens / yours:,.0f}", flush=True)
        ratios.append(yours / mine)
    return statistics.median(ratios)


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


@contextmanager
def vllm_engine(model: str) -> Iterator[Engines]:
    arguments = {"model": model, "window": CONTEXT - 1, "dtype": "auto", "max_batch_tokens": BATCH_TOKENS}
    with engines_of("benchmarks.score:Measured", arguments) as engines:
        yield engines


@contextmanager
def engines_of(factory: str, arguments: dict[str, Any]) -> Iterator[Engines]:
    folder = run_folder(f"benchmark-{os.getpid()}-{time.monotonic_ns()}")
    try:
        yield Engines(EngineSpec("reference", factory, arguments), folder, os.getpid())
    finally:
        stop(folder)


def server_options() -> list[tuple[str, Any]]:
    """The settings of `VllmScorer`, as `vllm serve` names them."""
    import torch

    on_cpu = not torch.cuda.is_available()
    options: list[tuple[str, Any]] = [
        ("--dtype", "float32" if on_cpu else "bfloat16"),
        ("--max-model-len", CONTEXT),
        ("--max-num-batched-tokens", BATCH_TOKENS),
        ("--max-num-seqs", 256),
        ("--no-enable-prefix-caching", None),
        ("--generation-config", "vllm"),
        ("--uvicorn-log-level", "error"),
        ("--skip-tokenizer-init", None),
    ]
    return options + ([("--enforce-eager", None)] if on_cpu else [("--gpu-memory-utilization", 0.4)])


@contextmanager
def vllm_server(model: str) -> Iterator[str]:
    """What `vllm serve` runs, on a free port of this machine; the command is missing from some builds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [str(word) for name, value in server_options() for word in (name, value) if word is not None]
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, *options], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {process.returncode}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def random_llama(folder: Path) -> str:
    """About as many tokens/s on one core as the grammar."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_folders.resolve("smollm2-135m"))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
