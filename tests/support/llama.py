"""A Llama of two layers with random weights, which many tests score, generate or serve with."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def tiny_llama(vocabulary: int, context: int, *, seed: int = 0, **settings: Any) -> "LlamaForCausalLM":
    """`settings` override the shape; with an `initializer_range` of 0.3 or more it writes varied text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=context, **shape | settings)
    return LlamaForCausalLM(config).eval()
