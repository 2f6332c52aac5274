"""What memory and batches are worth when a small model writes with a partner: ratios measured in one process.

    OMP_NUM_THREADS=1 python benchmarks/cascade.py [--layers 3] [--width 128] [--prompts 16] [--new-tokens 256]

cached_vs_uncached  tokens/s of `generate` with keys and values kept, of the small model and of the partner, over those
                    of `generate` that reads every text anew for each token
batched_vs_single   tokens/s of --batch texts side by side over those of the first --single of them, one after the other
calls_overhead      tokens/s with calls forbidden over those with the partner

Both models have random weights, the layout of GPT-2, and tokenizers of their own, so characters cross; the partner has
half again as many layers. Prompts are random words. All sides must write the same tokens with the same calls, or the
benchmark fails. Rates are medians over rounds, which alternate between the sides. The last line is one JSON object.

One thread of a CPU, float32: 7.5, 3.4 and 3.1 with the defaults; 10.3, 2.9 and 3.4 with --layers 4 --width 192
--prompt-words 12 --single 16 --rounds 1. The larger the models, the more memory is worth.
"""

import argparse
import json
import random
import statistics
import string
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from lacy.cascade.generate import Generation, Options, generate
from lacy.cascade.language_model import Model
from lacy.cascade.partners import Amount, InProcess
from tests.support.models import CALL, END, opened

HEAD = 64  # width of one
WORDS = 40_000  # that a tokenizer is trained on
SIDES = ("cached", "uncached", "single", "alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-words", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.22)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    disable_progress_bar()
    print(f"{torch.get_num_threads()} thread(s), {device()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        slm = model(Path(folder) / "slm", options, options.layers, seed=1)
        partner = model(Path(folder) / "partner", options, options.layers + (options.layers + 1) // 2, seed=2)
    prompts = [" ".join(words(options.prompt_words, seed=number)).capitalize() for number in range(options.prompts)]
    write("cached", slm, partner, prompts[:2], argparse.Namespace(**vars(options) | {"new_tokens": 4}))  # warm up
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    found: dict[str, list[Generation]] = {}
    for number in range(options.rounds):
        for side in SIDES:
            began = time.perf_counter()
            found[side] = write(side, slm, partner, prompts, options)
            seconds = time.perf_counter() - began
            rates[side].append(sum(len(text.tokens) for text in found[side]) / seconds)
            print(f"round {number + 1}, {side}: {told(found[side], seconds)}", flush=True)
            if any(text.finish != "length" for text in found[side]):
                sys.exit("a text ended early: choose a larger --context or fewer --new-tokens")
            if side != "alone" and written(found[side]) != written(found["cached"][: len(found[side])]):
                sys.exit(f"{side} and cached wrote other tokens")
    rate = {side: statistics.median(values) for side, values in rates.items()}
    result = {
        "cached_vs_uncached": rate["cached"] / rate["uncached"],
        "batched_vs_single": rate["cached"] / rate["single"],
        "calls_overhead": rate["alone"] / rate["cached"],
    }
    print(json.dumps({name: round(value, 2) for name, value in result.items()}))


def write(side: str, slm: Model, partner: Model, prompts: list[str], options: argparse.Namespace) -> list[Generation]:
    """In the order of the prompts."""
    one_by_one, remember = side == "single", side != "uncached"
    how = Options(max_new_tokens=options.new_tokens, budget=options.budget, batch=1 if one_by_one else options.batch)
    larger = InProcess(partner, slm.vocabulary, Amount(), how.sampling, slots=how.batch, remember=remember)
    asked = prompts[: options.single] if one_by_one else prompts
    texts = generate(slm, asked, None if side == "alone" else larger, how, remember=remember)
    return sorted(texts, key=lambda text: text.index)


def written(texts: list[Generation]) -> list[Any]:
    """Each token of each text, by whom it was written, and whether it called."""
    return [[(token.id, token.by, token.called) for token in text.tokens] for text in texts]


def told(texts: list[Generation], seconds: float) -> str:
    tokens = sum(len(text.tokens) for text in texts)
    calls = sum(text.calls for text in texts) / sum(text.positions for text in texts)
    return f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s, {calls:.1%} of the positions called"


def model(folder: Path, options: argparse.Namespace, layers: int, seed: int) -> Model:
    """Random weights, wide enough that it does not repeat itself, and a BPE over bytes; it never ends a text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab,
        special_tokens=[END, CALL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words(WORDS, seed=-seed))], trainer)
    end = tokenizer.token_to_id(END)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=options.context, n_embd=options.width, n_layer=layers,
        n_head=max(1, options.width // HEAD), initializer_range=2.4 / options.width**0.5, bos_token_id=end,
        eos_token_id=end, tie_word_embeddings=False,
    )  # fmt: skip
    network = GPT2LMHeadModel(config)
    with torch.no_grad():
        network.lm_head.weight[end] = 0
    return opened(folder, tokenizer, network)


def words(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(count)]


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
