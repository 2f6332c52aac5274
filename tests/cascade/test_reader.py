"""What a reader remembers changes nothing of what a model says."""

import random

import pytest
import torch

from lacy.cascade.reader import Reader
from lacy.schemas.errors import CascadeError
from tests.support import models

TOKENIZER = models.byte_level(600)
SIZE = TOKENIZER.get_vocab_size()
NETWORKS = {
    "gpt2": lambda: models.gpt2(TOKENIZER, 1),
    "llama": lambda: models.llama(TOKENIZER, 1),
    "sliding": lambda: _mistral(),
    "both": lambda: _qwen(),
}


def _mistral():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, sliding_window=8, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


def _qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, use_sliding_window=True,
            sliding_window=8, max_window_layers=1, layer_types=["full_attention", "sliding_attention"],
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def plain(network, ids: list[int]) -> torch.Tensor:
    return network(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("kind", NETWORKS)
def test_any_texts_at_any_pace(tmp_path, kind):
    """Texts that grow, are shortened, and replaced, some of them at a time: the logits of a plain forward pass."""
    model = models.opened(tmp_path, TOKENIZER, NETWORKS[kind]())
    reader = Reader(model, 5)
    choice = random.Random(0)

    def some(low: int, high: int) -> list[int]:
        return [choice.randrange(SIZE) for _ in range(choice.randint(low, high))]

    texts = [some(1, 30) for _ in range(5)]
    for step in range(40):
        slots = choice.sample(range(5), choice.randint(1, 5))
        for slot in slots:
            if choice.random() < 0.2:
                texts[slot] = texts[slot][: choice.randrange(len(texts[slot]))]
            if choice.random() < 0.05:
                texts[slot] = []
            texts[slot] = texts[slot] + some(1, 5)
        last = choice.choice([1, 1, 1, 7])
        found = reader.read(slots, [texts[slot] for slot in slots], last)
        for row, slot in zip(found, slots, strict=True):
            exact = plain(model.network, texts[slot])[-last:]
            torch.testing.assert_close(row[-len(exact) :], exact, atol=2e-4, rtol=1e-4)
            assert row[: -len(exact)].isnan().all(), step


def test_it_reads_no_token_twice(tmp_path, monkeypatch):
    model = models.opened(tmp_path, TOKENIZER, models.gpt2(TOKENIZER, 1))
    read = []
    forward = model.network.forward
    monkeypatch.setattr(
        model.network, "forward", lambda input_ids, **rest: read.append(input_ids.shape) or forward(input_ids, **rest)
    )
    reader = Reader(model, 2)
    reader.read([0, 1], [[1, 2, 3], [4, 5, 6]])
    reader.read([0, 1], [[1, 2, 3, 7], [4, 5, 6, 7]])
    reader.read([1], [[4, 5, 8, 7]])  # shortened by two, then two more
    reader.read([1], [[4, 5, 8, 7]])
    assert read == [(2, 3), (2, 1), (1, 2), (1, 1)]
    read.clear()
    reader.read([0, 1], [[1, 2, 3, 7, 8], [5] * 50])
    assert read == [(1, 1), (1, 50)]
    forgetful = Reader(model, 1, remember=False)
    read.clear()
    for length in (3, 4, 5):
        forgetful.read([0], [list(range(length))])
    assert read == [(1, 3), (1, 4), (1, 5)]


def test_a_failed_pass_is_not_remembered(tmp_path, monkeypatch):
    model = models.opened(tmp_path, TOKENIZER, models.llama(TOKENIZER, 1))
    reader = Reader(model, 1)
    reader.read([0], [[1, 2, 3]])
    block = model.network.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reader.read([0], [[1, 2, 9, 9]])
    torch.testing.assert_close(
        reader.read([0], [[1, 2, 3, 4]])[0], plain(model.network, [1, 2, 3, 4])[-1:], atol=2e-4, rtol=1e-4
    )


def test_a_model_without_keys_and_values(tmp_path):
    model = models.opened(tmp_path, TOKENIZER, models.llama(TOKENIZER, 1))
    model.network.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(CascadeError, match="run it in vLLM"):
        Reader(model, 1)


def test_a_model_with_a_state(tmp_path, monkeypatch):
    model = models.opened(tmp_path, TOKENIZER, models.llama(TOKENIZER, 1))
    monkeypatch.setattr(type(model.network), "_is_stateful", True)  # as that of Mamba or Jamba is
    with pytest.raises(CascadeError, match="run it in vLLM"):
        Reader(model, 1)
