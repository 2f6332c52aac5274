from pathlib import Path

import pytest

from tests.trainer.datasets import make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "dataset", judge=True)


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory) -> Path:
    """A model folder with a configuration and no weights: two layers, 32 wide."""
    from transformers import GPT2Config

    folder = tmp_path_factory.mktemp("models") / "gpt2"
    GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    ).save_pretrained(folder)  # fmt: skip
    return folder
