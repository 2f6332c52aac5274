"""How much of a GPU's arithmetic the vllm scorer uses, on a Llama of 1.2 billion parameters with random weights.

    python benchmarks/mfu.py [--contexts 1024 4096] [--tokens N] [--paths ids flat] [--profile FOLDER] [--tiny]

For each context and each way to ask vLLM for scores, `ids` (prompt_logprob_token_ids) and `flat` (prompt_logprobs=0),
prints tokens/s and the model FLOP utilisation: the operations that the model's matrix products need for a token,
2 x parameters (the output layer counts, the embedding does not) + 2 x layers x hidden x context for causal attention,
over the dense bf16 peak of the GPU. Documents are as long as the context, so no window is padded. --profile writes a
trace of one call by torch's profiler and prints the operations that took longest. --tiny: a few million parameters, to
see on a CPU that it runs; its utilisation is null. The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lacy.labelers.llm import load
from lacy.labelers.llm.vllm_scorer import VllmScorer

PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
}  # dense bf16, from the data sheets
SIZE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SIZE |= {"num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64}  # as Llama 3.2 1B
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "vocab_size": 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--paths", nargs="+", choices=["ids", "flat"], default=["ids", "flat"])
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    peak = next(
        (PEAK[name] for name in PEAK if torch.cuda.is_available() and name in torch.cuda.get_device_name()), None
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            **(TINY if arguments.tiny else SIZE), max_position_embeddings=2 * max(arguments.contexts),
            tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            network = LlamaForCausalLM(config).to(torch.bfloat16)
        parameters = sum(weight.numel() for weight in network.parameters())
        network.save_pretrained(folder)
        del network
        torch.cuda.empty_cache()
        for context in arguments.contexts:
            for batch in arguments.batch_tokens:
                rows += measure(folder, config, parameters, context, batch, peak, arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": device, "parameters": parameters, "rows": rows}))


def measure(
    model: str, config: LlamaConfig, parameters: int, context: int, batch: int, peak: float | None, arguments: Any
) -> list[dict[str, Any]]:
    scorer = load.scorer("vllm", model, window=context, max_batch_tokens=batch)
    assert isinstance(scorer, VllmScorer)
    generator = np.random.default_rng(0)
    count = max(2, arguments.tokens // context)
    documents = list(generator.integers(0, config.vocab_size, (count, context)).astype(np.int32))
    flops = 2 * parameters + 2 * config.num_hidden_layers * config.hidden_size * context
    rows = []
    for path in arguments.paths:
        if path == "ids" and not scorer.path.endswith("token_ids"):
            print(f"context {context}: the engine has no prompt_logprob_token_ids", flush=True)
            continue
        scorer.by_ids = path == "ids"
        scorer.score(documents[:8])
        seconds = []
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            scores = scorer.score(documents)
            seconds.append(time.perf_counter() - began)
            assert not any(score.error for score in scores)
        rate = count * context / sorted(seconds)[len(seconds) // 2]
        utilisation = rate * flops / peak if peak else None
        row = {"context": context, "path": path, "batch_tokens": batch, "tokens_per_second": round(rate)}
        rows.append(row | {"utilisation": utilisation and round(utilisation, 4)})
        print(json.dumps(rows[-1]), flush=True)
        if arguments.profile:
            profile(scorer, documents[: max(1, (1 << 16) // context)], arguments.profile / f"{context}-{path}.json")
    scorer.close()
    return rows


def profile(scorer: VllmScorer, documents: list[np.ndarray], trace: Path) -> None:
    """Needs VLLM_ENABLE_V1_MULTIPROCESSING=0: the profiler sees this process alone."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    trace.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with record(activities=activities) as recorded:
        scorer.score(documents)
    recorded.export_chrome_trace(str(trace))
    key = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    print(recorded.key_averages().table(sort_by=key, row_limit=20), flush=True)


if __name__ == "__main__":
    main()
