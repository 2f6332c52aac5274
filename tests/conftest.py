"""What many tests share: a small language model with its own tokenizer, made from a config, and the real command."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forks import CASCADE, LABEL, Forks

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# gcsfs reads this when it is imported, which any test may do: it would ask Google, over gRPC, what kind a bucket is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

LACY = Path(sys.executable).with_name("lacy")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A Llama with random weights, 2 layers, and a byte-level BPE of 1,000 entries: an ordinary model folder."""
    from lacy.pipeline.train_tokenizer import train
    from tests.support import corpora
    from tests.support.llama import tiny_llama

    folder = tmp_path_factory.mktemp("models") / "small"
    corpus = corpora.write(folder.parent / "c.jsonl", corpora.documents(200, seed=9))
    _, entries = train([str(corpus)], folder, vocab_size=1000)
    tiny_llama(entries, 256, bos_token_id=0, eos_token_id=0).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def dev_data() -> Path:
    """Real text with marked facts; tests that need it skip without."""
    folder = os.environ.get("LACY_DEV_DATA")
    if not folder or not (Path(folder) / "dwiki-dev.jsonl.gz").exists():
        pytest.skip("LACY_DEV_DATA names no folder with dwiki-dev.jsonl.gz")
    return Path(folder)


@pytest.fixture(scope="session")
def lacy(tmp_path_factory) -> Iterator[Forks]:
    """The real command, quickly; for what trains, generates and compares."""
    forks = Forks(tmp_path_factory.mktemp("forks"), CASCADE)
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def labeller(tmp_path_factory) -> Iterator[Forks]:
    """The same for what labels and counts; with one worker, which is the process itself."""
    forks = Forks(tmp_path_factory.mktemp("labeller"), LABEL)
    yield forks
    forks.close()


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of stderr, without those of progress, which a slow machine prints."""
    return [line for line in done.stderr.splitlines() if not line.startswith("label: ")]


def run_lacy(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    options = {"timeout": 300, "stdin": subprocess.DEVNULL} | options
    return subprocess.run([LACY, *map(str, arguments)], capture_output=True, text=True, **options)
