"""Commands run in a folder whose own modules have the names of our folders."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import corpora
from tests.test_architecture import FOLDERS

SCRIPT = """
import lacy

print(lacy.connect("d").sql("SELECT count(*) FROM documents").fetchall()[0][0])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's project: `python -m` puts this folder before all installed packages."""
    folder = tmp_path_factory.mktemp("project")
    for name in FOLDERS:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the user has a {name}.py, and it was imported')\n")
    (folder / "script.py").write_text(SCRIPT)
    corpora.write(folder / "c.jsonl", corpora.documents(4, seed=3))
    return folder


def test_commands_beside_a_users_own_modules(folder, small_model):
    def run(*arguments: object) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    grammar_alone = ("--reference", "none", "--policy", "factual", "--tokenizer", small_model)
    run("-m", "lacy", "label", "c.jsonl", "--out", "d", *grammar_alone)
    run("-m", "lacy", "decide", "d", "--policy", "random", "--budget", "0.1")
    assert "4 documents" in run("-m", "lacy", "stats", "d")
    assert "sound" in run("-m", "lacy", "check", "d")
    train = ("lacy", "train", "d", "--labels", "random", "--model", "tiny", "--context", "32", "--batch", "1")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "1")
    assert "done at step 1" in run(*torchrun, "-m", *train, "--out", "run", "--max-steps", "1")
    run("-m", "lacy", "generate", "run", "--partner", "none", "--prompt", "Odra", "--new-tokens", "2")
    assert run("script.py").strip() == "4"
