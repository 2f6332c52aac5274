"""The recipe: each step once, and on from where it stopped."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lacy.trainer import logs
from tests.conftest import run_lacy
from tests.support import corpora

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "experiments" / "paper.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("paper", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_is_done_once(recipe, tmp_path, capsys):
    count = tmp_path / "count"
    command = [sys.executable, "-c", f"open({str(count)!r}, 'a').write('x')"]
    for _ in range(2):
        recipe.step(tmp_path, command)
    assert count.read_text() == "x"
    assert "already done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="rerun the same command to resume"):
        recipe.step(tmp_path, [sys.executable, "-c", "raise SystemExit(3)"])
    assert len((tmp_path / "done.jsonl").read_text().splitlines()) == 1
    for _ in range(2):
        recipe.step(tmp_path, command, "step-2")
    assert count.read_text() == "xx", "on another checkpoint"


def test_a_partner_has_results_of_its_own(recipe, tmp_path, small_model):
    folder = recipe.as_run(str(small_model), tmp_path / "partner")
    assert (folder / "config.json").resolve() == (small_model / "config.json").resolve()
    assert recipe.as_run(str(small_model), tmp_path / "partner") == folder
    assert recipe.as_run("http://127.0.0.1:1", tmp_path / "server") is None
    assert recipe.as_run("none", tmp_path / "none") is None


@pytest.mark.slow
def test_the_whole_recipe(tmp_path, small_model):
    """Two objectives, trained for a moment: every figure of the table, and nothing done twice."""
    corpus = corpora.write(tmp_path / "corpus.jsonl", corpora.documents(60, seed=3))
    done = run_lacy("label", corpus, "--out", tmp_path / "labelled", "--reference", small_model, "--workers", 1)
    assert done.returncode == 0, done.stderr
    command = [
        sys.executable, RECIPE, "smoke", "--dataset", tmp_path / "labelled", "--partner", small_model,
        "--out", tmp_path / "paper", "--objectives", "lacy,standard", "--train", "gt-tokens=3000", "--pairs", 10,
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("already done") == done.stdout.count("== ") >= 11
    learned = [logs.read(tmp_path / "paper" / name)[-1] for name in ("lacy", "standard")]
    assert all(3000 <= last["gt_tokens"] < 3000 + last["tokens"] / last["step"] for last in learned), "as many of each"
    command[-3] = "gt-tokens=6000"
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already done") == 1, "all but the partner alone is measured again"
    [row, other] = [line for line in done.stdout.splitlines() if line.split()[:1] in (["lacy"], ["standard"])][:2]
    assert row.count(" % ") + row.count(" %") >= 3 and other.split()[0] == "standard"
    assert (tmp_path / "paper" / "compare.html").read_text().startswith("<!doctype html>")
    questions = (tmp_path / "paper" / "continuations" / "continuation.jsonl").read_text().splitlines()
    for line in questions:
        question = json.loads(line)
        assert len(question["choices"]) == 4 and 0 <= question["label"] < 4
