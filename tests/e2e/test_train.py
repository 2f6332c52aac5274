"""`lacy train`, the command: what it prints, how it ends, what it refuses."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import LACY
from tests.support.datasets import make

SMALL = ["--model", "tiny", "--context", 32, "--batch", 2, "--holdout", 0.1, "--loader-workers", 0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("labelled") / "dataset")


def test_what_a_run_prints(tmp_path, dataset, lacy):
    done = lacy("train", dataset, "--out", tmp_path / "run", "--max-steps", 4, *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert re.fullmatch(
        r"\d[\d,]+ parameters, lacy, CPU, fp32; 64 tokens a step, 4 steps, from the beginning", lines[0]
    )
    assert re.match(r"train: step 4, learn \d\.\d{3}, call \d\.\d{3} \(15\.6%\), [\d,]+ tokens/s, ", lines[1])
    assert re.match(r"step 4, held out: nats \d\.\d{3} factual, \d\.\d{3} other; AUC of p\(<CALL>\)", lines[2])
    assert re.match(r"done at step 4: 256 tokens, 216 of them learned \(.*step-00000004$", lines[3])
    assert len(lines) == 4
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_steps"] == 4


def test_what_it_refuses(tmp_path, dataset, lacy):
    def refused(*arguments: object) -> tuple[int, str]:
        done = lacy("train", *arguments, "--out", tmp_path / "run")
        *before, message = done.stderr.splitlines()
        assert message.startswith("lacy: ") and all("from the beginning" in line for line in before), done.stderr
        return done.returncode, message

    code, message = refused(dataset, "--objective", "lcy")
    assert code == 2 and message.startswith("lacy: --objective: 'lcy' is not one of 'standard', 'lacy'")
    broken = make(tmp_path / "broken")
    part = broken / "labels" / "lacy" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    code, message = refused(broken, *SMALL)
    assert code == 1 and "part-00001.parquet is not the file that was written, its checksum differs" in message
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_signal(tmp_path, dataset):
    """To the whole group of processes, twice, as torchrun and schedulers send it; loader workers are in the group."""
    options = [*SMALL, "--loader-workers", 1, "--accumulate", 4, "--log-every", 1, "--max-steps", 100_000]
    command = list(map(str, [LACY, "train", dataset, "--out", tmp_path / "run", *options]))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert re.search(r"stopped at step \d+: .*checkpoints/step-\d{8}; resume with --resume\n$", told)


def test_torchrun(tmp_path, dataset):
    command = [
        "torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
        "-m", "lacy", "train", dataset, "--out", tmp_path / "run", "--max-steps", 3, "--parallel", "fsdp", *SMALL,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done at step 3: 384 tokens") == 1 and "2 x CPU" in done.stderr
