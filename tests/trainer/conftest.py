from pathlib import Path

import pytest

from tests.support.datasets import make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "dataset", judge=True)


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory) -> Path:
    """A model folder with a configuration and no weights: two layers, 32 wide, with dropout."""
    return _gpt2(tmp_path_factory.mktemp("models") / "gpt2", 0.1)


@pytest.fixture(scope="session")
def still_gpt2(tmp_path_factory) -> Path:
    """The same without dropout."""
    return _gpt2(tmp_path_factory.mktemp("models") / "still", 0.0)


def _gpt2(folder: Path, dropout: float) -> Path:
    from transformers import GPT2Config

    GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    ).save_pretrained(folder)  # fmt: skip
    return folder
