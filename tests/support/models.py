"""Small models for a cascade: random weights, and tokenizers of several kinds, as ordinary model folders."""

import json
import random
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lacy.cascade.language_model import Model, open_model
from lacy.cascade.vocabulary import Vocabulary, vocabulary
from tests.support import corpora
from tests.support.llama import tiny_llama

END, CALL = "<|endoftext|>", "<CALL>"


@cache
def byte_level(size: int, seed: int = 9) -> Tokenizer:
    """A BPE over bytes, with the end token and <CALL>; sizes and seeds cut text differently."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, size, seed, pre_tokenizers.ByteLevel.alphabet())


@cache
def composed(size: int, seed: int = 9) -> Tokenizer:
    """As Qwen's: bytes, of text in Unicode's composed form."""
    tokenizer = Tokenizer.from_str(byte_level(size, seed).to_str())
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@cache
def sentencepiece(size: int, seed: int = 9) -> Tokenizer:
    """As Llama 2's: a space in front of a text, byte pieces for characters that it has not seen."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END, CALL, "<unk>", *bytes_], show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in (END, CALL, "<unk>")
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["special"]]
    return Tokenizer.from_str(json.dumps(spec))


def permuted(tokenizer: Tokenizer, order: list[int]) -> Tokenizer:
    """The same pieces under other ids: what was id i is order[i]."""
    spec = json.loads(tokenizer.to_str())
    spec["model"]["vocab"] = {token: order[index] for token, index in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        token["id"] = order[token["id"]]
    return Tokenizer.from_str(json.dumps(spec))


def save(folder: Path, tokenizer: Tokenizer, network: torch.nn.Module) -> Path:
    network.save_pretrained(str(folder))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "additional_special_tokens": [CALL]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def gpt2(tokenizer: Tokenizer, seed: int, context: int = 256) -> GPT2LMHeadModel:
    """Random weights, large enough that it writes varied text."""
    torch.manual_seed(seed)
    size = tokenizer.get_vocab_size()
    end = tokenizer.token_to_id(END)
    config = GPT2Config(
        vocab_size=size, n_positions=context, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=end, eos_token_id=end, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama(tokenizer: Tokenizer, seed: int, context: int = 256, **settings: object) -> LlamaForCausalLM:
    end = tokenizer.token_to_id(END)
    heads = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = heads | {"initializer_range": 0.3, "bos_token_id": end, "eos_token_id": end}
    return tiny_llama(tokenizer.get_vocab_size(), context, seed=seed, **shape | settings)


@torch.no_grad()
def only_words(network: GPT2LMHeadModel, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """Let it write nothing but words of letters behind a space: what it writes is cut again as it was."""
    read = vocabulary(tokenizer, "test")
    for index, piece in enumerate(read.pieces):
        text = (piece or b"").decode(errors="replace")
        word = text.startswith(" ") and text[1:].isascii() and text[1:].isalpha() and read.read(text)[0] == [index]
        if not word and index != read.call_id:
            network.lm_head.weight[index] = 0
    return network


@torch.no_grad()
def renumbered(network: GPT2LMHeadModel, order: list[int]) -> GPT2LMHeadModel:
    """The same network for `permuted` ids."""
    place = torch.tensor(order)
    end = order[network.config.eos_token_id]
    copy = GPT2LMHeadModel(GPT2Config(**network.config.to_dict() | {"bos_token_id": end, "eos_token_id": end})).eval()
    copy.load_state_dict(network.state_dict())
    for theirs, ours in (
        (copy.transformer.wte, network.transformer.wte),
        (copy.lm_head, network.lm_head),
    ):
        theirs.weight[place] = ours.weight
    return copy


def shuffled(size: int, seed: int) -> list[int]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order


def opened(folder: Path, tokenizer: Tokenizer, network: torch.nn.Module) -> Model:
    return open_model(save(folder, tokenizer, network))


def read(tokenizer: Tokenizer) -> Vocabulary:
    return vocabulary(tokenizer, "test")


def _texts(seed: int) -> list[str]:
    return [row["text"] for row in corpora.documents(200, seed=seed)]


def _trained(tokenizer: Tokenizer, size: int, seed: int, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END, CALL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    return tokenizer
