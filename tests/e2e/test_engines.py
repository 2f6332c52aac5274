"""`lacy label` with models in engines: real vLLM, killed in mid-run, and as a judge."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import LACY, run_lacy, told
from tests.e2e.test_label import digests, rows
from tests.support import corpora

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return corpora.write(tmp_path_factory.mktemp("corpus") / "a.jsonl", corpora.documents(80, seed=1))


def arguments(corpus: Path, out: Path, model: Path, *more: object) -> list[str]:
    fixed = ["label", corpus, "--out", out, "--reference", model, "--part-bytes", 4096, "--workers", 2]
    return [*map(str, fixed), *map(str, more)]


def engines_of(launcher: int) -> list[psutil.Process]:
    """They are nobody's children for long: a worker starts them, and they outlive it."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "lacy.labelers.llm.engine_process" in words and words[-1] == str(launcher):
            found.append(process)
    return found


@pytest.mark.slow
def test_a_killed_engine_changes_no_byte(corpus, small_model, tmp_path):
    vllm = ("--scorer", "vllm", "--engine-arg", "kv_cache_memory_bytes=268435456")
    done = run_lacy(*arguments(corpus, tmp_path / "undisturbed", small_model, *vllm))
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [LACY, *arguments(corpus, tmp_path / "killed", small_model, *vllm)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "killed" / ".parts").glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    (engine,) = engines_of(process.pid)
    os.kill(engine.pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "undisturbed")
    assert not engines_of(process.pid)
    manifest = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    assert {part["scored"]["reference"] for part in manifest["parts"]} == {"vllm prompt_logprobs"}
    assert manifest["bad"] == 0 and manifest["documents"] == 80
    assert manifest["options"]["engine_arg"]["reference"] == {"kv_cache_memory_bytes": 268435456}


@pytest.mark.slow
def test_engines_do_not_change_what_a_scorer_says(corpus, small_model, tmp_path):
    for name, more in (("workers", ()), ("engines", ("--engines", 2))):
        done = run_lacy(*arguments(corpus, tmp_path / name, small_model, "--scorer", "transformers", *more))
        assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "workers") == digests(tmp_path / "engines")


@pytest.fixture(scope="module")
def chat_model(small_model, tmp_path_factory) -> Path:
    """The small model with room for the judge's prompt. What it says is noise, but noise in the form of the schema."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return folder


def test_a_judge_gives_each_window_a_verdict_or_counts_it(small_model, chat_model, tmp_path):
    texts = corpora.documents(4, seed=3)
    corpus = corpora.write(tmp_path / "a.jsonl", texts)
    judge = ("--judge", chat_model, "--policy", "judge", "--scorer", "transformers")
    done = run_lacy(*arguments(corpus, tmp_path / "d", small_model, *judge))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    from lacy.labelers.judge import passages, prompt

    judged = manifest["judged"]
    windows = sum(len(passages(row["text"])) for row in texts)
    assert judged["windows_judged"] + judged["windows_unjudged"] == windows
    assert f"{judged['windows_judged']:,} windows judged, {judged['windows_unjudged']:,} not" in done.stderr
    assert manifest["models"]["judge"]["prompt"] == prompt().version
    assert manifest["models"]["judge"]["prompt_sha256"] == prompt().sha256
    for row in rows(tmp_path / "d"):
        assert len(row["judge"]) == len(row["token_ids"])
        assert all(score is None or 0 <= score <= 1 for score in row["judge"])
    for row in rows(tmp_path / "d", "labels/judge"):
        marked = [bool(score) for score in row["judge"]]
        assert all(mark for mark, label in zip(marked, row["label"], strict=True) if label)
    assert run_lacy("check", tmp_path / "d").returncode == 0
    done = run_lacy(*arguments(corpus, tmp_path / "d", small_model, *judge[2:]))
    assert done.returncode == 2 and "judge" in done.stderr and len(told(done)) == 1


@pytest.mark.slow
def test_the_estimate_of_a_corpus_that_is_all_sample_is_its_count(corpus, small_model, tmp_path):
    grammar = ["label", corpus, "--reference", "none", "--tokenizer", small_model, "--policy", "factual"]
    grammar += ["--workers", 2, "--out", tmp_path / "d"]
    done = run_lacy(*grammar, "--estimate")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "d").exists()
    cells = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    truth = run_lacy(*grammar)
    assert truth.returncode == 0, truth.stderr
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert cells["documents"][1] == f"{manifest['documents']:,}"
    assert cells["tokens"][1] == f"{manifest['tokens']:,}"
    assert any(line.startswith("grammar, on one core") for line in done.stdout.splitlines())
    done = run_lacy(*grammar, "--estimate", "--limit", 5)
    assert done.returncode == 2 and "leave out --limit" in done.stderr
