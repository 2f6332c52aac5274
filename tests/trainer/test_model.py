"""Networks from presets and folders: their sizes, their attention, what is refused, and who opens a checkpoint."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GraniteConfig, LlamaConfig

from lacy.schemas.errors import TrainingError, UsageError
from lacy.trainer import model, shards
from lacy.trainer.config import TrainConfig
from lacy.trainer.model import PRESETS, build
from lacy.trainer.train import train


@pytest.fixture(scope="module")
def labels(dataset):
    return shards.open_labels(str(dataset), None)


def configured(tmp_path, **options):
    return TrainConfig(dataset="-", out=tmp_path / "run", **options)


@pytest.mark.parametrize(
    "preset, millions",
    [("gpt2-334m", 336), ("gpt2-1.3b", 1276), ("llama-334m", 336), ("llama-1.3b", 1299), ("tiny", 5)],
)
def test_presets(tmp_path, labels, preset, millions):
    with torch.device("meta"):
        network = build(configured(tmp_path, model=preset), dataclasses.replace(labels, vocab_size=32_001))
    assert network.num_parameters() / 1e6 == pytest.approx(millions, abs=0.6)
    assert network.config.vocab_size == 32_064
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert network.config.max_position_embeddings == PRESETS[preset].context


def test_the_seed_makes_the_weights(tmp_path, labels):
    one, same, other = (build(configured(tmp_path, model="tiny", seed=seed), labels) for seed in (1, 1, 2))
    weights = [network.get_input_embeddings().weight for network in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


CONFIGS = {
    "gpt2": GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
    "grouped llama": LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    CONFIGS[request.param].save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_attention_is_that_of_transformers(tmp_path, labels, folder):
    network = build(configured(tmp_path, model=str(folder)), labels).eval()
    theirs = AutoModelForCausalLM.from_config(network.config, attn_implementation="eager").eval()
    theirs.load_state_dict(network.state_dict())
    ids = torch.randint(0, 200, (3, 40))
    torch.testing.assert_close(network(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_masked_document_sees_itself_alone(tmp_path, labels, folder):
    network = build(configured(tmp_path, model=str(folder)), labels).eval()
    learner = model.Learner(network, labels.call_id)
    documents = [torch.randint(2, 200, (length,)) for length in (9, 1, 20)]
    packed = torch.cat([torch.cat([torch.tensor([0]), document]) for document in documents])[None]
    positions = torch.cat([torch.arange(len(document) + 1) for document in documents])[None]
    together = learner(packed, positions[:, :-1]).nll
    crossing = learner(packed).nll
    at = 0
    for document in documents:
        alone = learner(torch.cat([torch.tensor([0]), document])[None]).nll
        torch.testing.assert_close(together[at : at + len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert at == 0 or not torch.allclose(crossing[at : at + len(alone)], alone, rtol=1e-4)
        at += len(document) + 1


def test_the_flops_of_a_token(tmp_path, labels):
    """Against torch's own count of the products of a forward and a backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    network = build(configured(tmp_path, model="tiny"), labels)
    network.set_attn_implementation("eager")  # which it sees through
    ids = torch.randint(0, 200, (2, 256))
    with FlopCounterMode(display=False) as counter:
        network(ids).logits.sum().backward()
    assert model.flops_per_token(network, 256) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.05)


def test_a_folder_gets_rows_for_the_whole_vocabulary(tmp_path, labels, folder):
    larger = dataclasses.replace(labels, vocab_size=300)
    network = build(configured(tmp_path, model=str(folder)), larger)
    assert network.config.vocab_size == len(network.get_output_embeddings().weight) == 320


def test_logits_that_are_no_plain_projection_are_refused(tmp_path, labels):
    GraniteConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=4.0,
    ).save_pretrained(tmp_path / "granite")  # fmt: skip
    with pytest.raises(TrainingError, match="not a plain projection"):
        build(configured(tmp_path, model=str(tmp_path / "granite")), labels)


def test_what_is_no_model(tmp_path, labels, folder):
    with pytest.raises(TrainingError, match=r"--model gpt5 is neither a preset .* nor a folder with config\.json"):
        build(configured(tmp_path, model="gpt5"), labels)
    tokens = labels.tokens + sum(record.rows for record in labels.records)
    build(configured(tmp_path, model="tiny", context=tokens - 1), labels)
    with pytest.raises(UsageError, match=f"--context {tokens} is longer than the data"):
        build(configured(tmp_path, model="tiny", context=tokens), labels)
    with pytest.raises(UsageError, match="--context 65 is more than the model's 64 positions: use a smaller --context"):
        build(configured(tmp_path, model=str(folder), context=65), labels)
    (folder / "config.json").write_text("{")
    with pytest.raises(TrainingError, match="cannot read"):
        build(configured(tmp_path, model=str(folder)), labels)


def test_a_folder_with_another_tokenizer(tmp_path, labels, folder):
    (folder / "tokenizer.json").write_bytes(labels.tokenizer_json)
    build(configured(tmp_path, model=str(folder)), labels)
    (folder / "tokenizer.json").write_bytes(labels.tokenizer_json.replace(b'"w7"', b'"seven"'))
    with pytest.raises(TrainingError, match=r"the tokenizer of .* is not the dataset's: label the corpus with"):
        build(configured(tmp_path, model=str(folder)), labels)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TrainingError, match=r"cannot read .*tokenizer\.json"):
        build(configured(tmp_path, model=str(folder)), labels)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_transformers_and_vllm_open_a_checkpoint_and_agree(tmp_path, dataset):
    options = {"model": "tiny", "objective": "standard", "context": 64, "max_steps": 60, "lr": 0.005, "holdout": 0}
    train(TrainConfig(dataset=str(dataset), out=tmp_path / "run", tensorboard=False, **options))
    folder = tmp_path / "run" / "checkpoints" / "step-00000060"
    network = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert network.dtype == torch.float32 and tokenizer.eos_token_id == network.generation_config.eos_token_id == 0
    prompts = [tokenizer(text)["input_ids"] for text in ("w3 w5 w9", "w100", "w8 w8 w8 w8 w10 w20 w30")]
    theirs = [
        network.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    assert len({tuple(ids) for ids in theirs}) == 3
    assert vllm_continues(folder, prompts) == theirs


# In a process of its own: a process holds only one CPU engine at a time.
VLLM = """
import json, sys
from vllm import SamplingParams
from lacy.labelers.llm.vllm_scorer import close_engine, open_engine
folder, prompts = json.loads(sys.argv[1])
engine = open_engine(folder, "float32", 1, False, {"kv_cache_memory_bytes": 1 << 28})
greedy = SamplingParams(temperature=0, max_tokens=16)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
close_engine(engine)
"""


def vllm_continues(folder, prompts):
    asked = json.dumps([str(folder), prompts])
    done = subprocess.run([sys.executable, "-c", VLLM, asked], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
