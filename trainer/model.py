"""The small model: a Hugging Face architecture from a preset or a folder, and its placement on devices."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig, PreTrainedConfig
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from lacy.schemas.errors import TrainingError, UsageError
from lacy.trainer import head
from lacy.trainer.config import TrainConfig
from lacy.trainer.head import Measures, Stats
from lacy.trainer.ranks import Ranks
from lacy.trainer.shards import Labels, vocabulary

ROUND_TO = 64  # rows of the vocabulary: matrix products are faster


@dataclass(frozen=True)
class Preset:
    kind: type[PreTrainedConfig]
    layers: int
    width: int
    heads: int
    context: int = 1024
    inner: int | None = None  # None: four times the width
    lr: float = 3e-4


PRESETS = {
    "gpt2-334m": Preset(GPT2Config, layers=24, width=1024, heads=16),  # the paper's two (arXiv 2602.12005)
    "gpt2-1.3b": Preset(GPT2Config, layers=24, width=2048, heads=32, lr=2e-4),
    "llama-334m": Preset(LlamaConfig, layers=24, width=1024, heads=16, inner=2752),
    "llama-1.3b": Preset(LlamaConfig, layers=24, width=2048, heads=32, inner=5632, lr=2e-4),
    "tiny": Preset(GPT2Config, layers=4, width=128, heads=4, context=256, lr=3e-3),
}


class Learner(nn.Module):
    """A network and its vocabulary projection as one module, so that wrappers gather the weights of both."""

    def __init__(self, network: PreTrainedModel, call_id: int):
        super().__init__()
        self.network = network
        self.call_id = call_id

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        gradient: torch.Tensor | None = None,
        measure: bool = False,
    ) -> Stats | Measures:
        """Compute the statistics of the B*T targets in ids (B, T+1).

        Args:
            positions: (B, T), restart at each document; None lets attention cross documents.
            gradient: as in `lacy.trainer.head.project`.
            measure: return what `lacy.trainer.head.measure` does.
        """
        inputs, targets = ids[:, :-1].long(), ids[:, 1:].reshape(-1).long()
        extra = {} if positions is None else {"position_ids": positions, "documents": _documents(positions)}
        output = self.network.base_model(input_ids=inputs, use_cache=False, **extra)
        hidden = output.last_hidden_state.flatten(0, 1)  # (B*T, d)
        weight = self.network.get_output_embeddings().weight  # (V, d)
        if measure:
            return head.measure(hidden, weight, targets, self.call_id)
        return head.project(hidden, weight, targets, self.call_id, gradient=gradient)


def build(config: TrainConfig, labels: Labels) -> PreTrainedModel:
    """Build the network in float32 on the CPU, with weights from the seed or from the folder `config.model`.

    Raises UsageError when the context is longer than the data or the model's positions; TrainingError when there is no
    such preset or folder, or when it cannot be trained on these labels.
    """
    tokens = labels.tokens + sum(record.rows for record in labels.records)  # with the end token of each document
    if config.context and config.context >= tokens:
        raise UsageError(
            f"--context {config.context} is longer than the data ({labels.root} has {tokens:,} tokens): "
            "use a smaller --context"
        )
    torch.manual_seed(config.seed)
    if config.model in PRESETS:
        settings = _preset(PRESETS[config.model], config.context, config.dropout, labels)
        network = AutoModelForCausalLM.from_config(settings, attn_implementation=ATTENTION)
    else:
        network = _from_folder(config.model, labels)
    longest = getattr(network.config, "max_position_embeddings", None)
    if config.context and longest and config.context > longest:
        raise UsageError(
            f"--context {config.context} is more than the model's {longest} positions: use a smaller --context"
        )
    network.config.architectures = [type(network).__name__]
    network.config.dtype = torch.float32
    network.config.bos_token_id = network.config.eos_token_id = labels.eos_id
    network.config.pad_token_id = None  # with one, transformers looks for padding in every batch
    network.generation_config = GenerationConfig(
        bos_token_id=labels.eos_id, eos_token_id=labels.eos_id, pad_token_id=labels.eos_id
    )
    return network


def place(network: PreTrainedModel, call_id: int, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """Move the network with its head to this rank's device, and wrap it to train together with the other ranks."""
    if config.checkpoint_activations:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    learner = Learner(network, call_id).to(ranks.device).train()
    if config.compile == "on" or (config.compile == "auto" and ranks.device.type == "cuda"):
        for block in blocks(network):
            block.compile()
    if ranks.count == 1:
        return learner
    if config.parallel == "ddp":
        device_ids = [ranks.device] if ranks.device.type == "cuda" else None
        return DistributedDataParallel(learner, device_ids=device_ids, gradient_as_bucket_view=True)
    narrow = torch.bfloat16 if precision(config, ranks.device) == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32 if narrow else None)
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for block in blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The learner's one input of floats is a gradient that `head.project` is promised: to be kept as it is.
    fully_shard(learner, mesh=mesh, mp_policy=replace(policy, cast_forward_inputs=False))
    return learner


def precision(config: TrainConfig, device: torch.device) -> str:
    """The arithmetic of a run: fp32, tf32 or bf16."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def context(config: TrainConfig) -> int:
    """Tokens in one sequence: `config.context`, or the default of the model."""
    if config.context:
        return config.context
    if config.model in PRESETS:
        return PRESETS[config.model].context
    settings = _settings(config.model)
    return min(1024, getattr(settings, "max_position_embeddings", 1024))


def is_there(name: str) -> bool:
    """Whether `name` is a preset or a model folder."""
    return name in PRESETS or (Path(name) / "config.json").is_file()


def learning_rate(config: TrainConfig) -> float:
    return config.lr or (PRESETS[config.model].lr if config.model in PRESETS else 3e-4)


def blocks(network: PreTrainedModel) -> list[nn.Module]:
    """The layers: the longest list of modules in the network."""
    lists = [list(module) for module in network.base_model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def flops_per_token(network: PreTrainedModel, context: int) -> float:
    """FLOPs of the matrix products in a forward and a backward pass: 6 N + 12 L d T (PaLM, arXiv 2204.02311, app. B).

    N leaves out position embeddings, and input embeddings that are not the output's too.
    """
    settings = network.config.get_text_config()
    embeddings = [m for m in network.base_model.modules() if isinstance(m, nn.Embedding)]
    output = network.get_output_embeddings().weight
    looked_up = sum(m.weight.numel() for m in embeddings if m.weight is not output)
    count = sum(p.numel() for p in network.parameters()) - looked_up
    return 6 * count + 12 * settings.num_hidden_layers * settings.hidden_size * context


def _preset(preset: Preset, context: int | None, dropout: float, labels: Labels) -> PreTrainedConfig:
    rows = -(-labels.vocab_size // ROUND_TO) * ROUND_TO
    length = context or preset.context
    if preset.kind is GPT2Config:
        return GPT2Config(
            vocab_size=rows,
            bos_token_id=labels.eos_id,
            eos_token_id=labels.eos_id,
            n_positions=length,
            n_embd=preset.width,
            n_layer=preset.layers,
            n_head=preset.heads,
            n_inner=preset.inner,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    return LlamaConfig(
        vocab_size=rows,
        bos_token_id=labels.eos_id,
        eos_token_id=labels.eos_id,
        max_position_embeddings=length,
        hidden_size=preset.width,
        intermediate_size=preset.inner or 4 * preset.width,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        tie_word_embeddings=True,
        attention_dropout=dropout,
    )


def _settings(folder: str) -> PreTrainedConfig:
    if not is_there(folder):
        raise TrainingError(
            f"--model {folder} is neither a preset ({', '.join(PRESETS)}) nor a folder with config.json", usage=True
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read {folder}/config.json: {' '.join(str(error).split())[:300]}") from None


def _from_folder(folder: str, labels: Labels) -> PreTrainedModel:
    """Open a model folder, with random weights where it has none, and with rows for the dataset's whole vocabulary."""
    settings = _settings(folder)
    _same_tokenizer(folder, labels)
    try:
        if any(Path(folder).glob("*.safetensors")):
            network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION)
        else:
            network = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation=ATTENTION)
    except Exception as error:
        raise TrainingError(f"cannot open the model {folder}: {' '.join(str(error).split())[:300]}") from error
    if _rows(network) < labels.vocab_size:
        network.resize_token_embeddings(labels.vocab_size, pad_to_multiple_of=ROUND_TO)
    if not plain_head(network):
        raise TrainingError(f"{folder}: its logits are not a plain projection (scaled, capped, or with a bias)")
    return network


def _rows(network: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    return len(network.get_input_embeddings().weight)  # type: ignore[arg-type]


def _same_tokenizer(folder: str, labels: Labels) -> None:
    """Raises TrainingError where a model folder has a tokenizer that gives a token another id than the dataset does."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return
    try:
        theirs = vocabulary(file.read_bytes())
    except Exception as error:
        raise TrainingError(f"cannot read {file}: {' '.join(str(error).split())[:300]}") from None
    ours = vocabulary(labels.tokenizer_json)
    if any(ours.get(token) != index for token, index in theirs.items()):
        raise TrainingError(
            f"the tokenizer of {folder} is not the dataset's: label the corpus with --tokenizer {folder}, "
            f"or train another model",
            usage=True,
        )


@torch.inference_mode()
def plain_head(network: PreTrainedModel) -> bool:
    """Whether the logits are hidden states times the output embedding, as `lacy.trainer.head` computes them.

    Some architectures scale or cap them, or add a bias. Tried on a short prompt.
    """
    layer = network.get_output_embeddings()
    if layer is None or getattr(layer, "bias", None) is not None:
        return False
    prompt = (torch.arange(16, device=network.device) * (_rows(network) // 16))[None]
    training = network.training
    network.eval()
    logits = network(input_ids=prompt, use_cache=False).logits.float()
    hidden = network.base_model(input_ids=prompt, use_cache=False).last_hidden_state
    network.train(training)
    product = nn.functional.linear(hidden, layer.weight).float()
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 1e-2 * float(logits.std())
    return logits.shape == product.shape and torch.allclose(logits, product, rtol=1e-4, atol=tolerance)


def tokenizer_files(labels: Labels, context: int) -> dict[str, bytes]:
    """Files, by name, with which `transformers` and vLLM open the dataset's tokenizer."""
    settings = labels.tokenizer_config | {
        "bos_token": labels.eos_token,
        "pad_token": labels.eos_token,
        "model_max_length": context,
    }
    return {
        "tokenizer.json": labels.tokenizer_json,
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode(),
    }


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention for packed sequences, (B, heads, T, head width) to (B, T, heads, head width).

    The library's own attention asks the device in every pass whether documents are packed, which stalls a GPU.
    """
    grouped = query.shape[1] != key.shape[1]
    if documents is None or isinstance(documents, torch.Tensor):
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=documents,
            dropout_p=dropout if module.training else 0.0,
            is_causal=documents is None,
            scale=scaling,
            enable_gqa=grouped,
        )
    else:
        query, key = query.to(value.dtype), key.to(value.dtype)  # rotated in float32 under autocast
        out = _flex(query, key, value, block_mask=documents, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


def _documents(positions: torch.Tensor) -> Any:
    """The mask of attention within documents: a BlockMask on a GPU, else (B, 1, T, T) bool."""
    document = (positions == 0).cumsum(1)  # (B, T)
    rows, length = positions.shape
    if positions.device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        global _flex
        _flex = _flex or torch.compile(flex_attention)  # made here, before the compiled blocks use it

        def within(b: Any, h: Any, q: Any, k: Any) -> Any:
            return (q >= k) & (document[b, q] == document[b, k])

        return create_block_mask(within, rows, None, length, length, device=positions.device.type)
    same = document[:, :, None] == document[:, None, :]
    return torch.tril(same)[:, None]


_flex: Any = None
ATTENTION = "lacy"
AttentionInterface.register(ATTENTION, _attend)
