"""`lacy label` as users run it: to the end, interrupted, killed, repaired, with other options, on bad input."""

import bz2
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from lacy.schemas.card import card
from lacy.schemas.manifest import label_sets, read_complete
from tests.conftest import LACY, run_lacy, told
from tests.support import corpora

PART_BYTES = 4096


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three files, one of them a stream: about 20,000 tokens in some 25 parts."""
    folder = tmp_path_factory.mktemp("corpus")
    corpora.write(folder / "a.jsonl", corpora.documents(80, seed=1))
    corpora.write(folder / "b.jsonl.gz", corpora.documents(50, seed=2))
    corpora.write(folder / "c.parquet", corpora.documents(20, seed=3))
    return folder


def arguments(corpus, out, model, *more) -> list[object]:
    return ["label", corpus, "--out", out, "--reference", model, "--part-bytes", PART_BYTES, *more]


@pytest.fixture(scope="module")
def labelled(corpus, small_model, tmp_path_factory, labeller) -> Path:
    """The dataset that an undisturbed run with one worker writes."""
    out = tmp_path_factory.mktemp("labelled") / "dataset"
    done = labeller(*arguments(corpus, out, small_model, "--workers", 1))
    assert done.returncode == 0, done.stderr
    return out


def digests(dataset: Path) -> dict[str, str]:
    """Of every file that counts, by its place in the dataset."""
    files = [path for path in dataset.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def rows(dataset: Path, kind: str = "signals") -> list[dict]:
    return [row for path in sorted((dataset / kind).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_every_document_is_labelled(labelled, corpus):
    manifest = json.loads((labelled / "manifest.json").read_text())
    assert manifest["state"] == "complete"
    assert (manifest["documents"], manifest["bad"]) == (150, 0)
    made = corpora.documents(80, 1) + corpora.documents(50, 2) + corpora.documents(20, 3)
    expected = {row["id"]: row["text"] for row in made}
    found = rows(labelled)
    assert {row["doc_id"]: row["text"] for row in found} == expected
    assert len(manifest["parts"]) > 15
    names = {path.name for path in labelled.iterdir()}
    assert names - {".lock"} == {"manifest.json", "README.md", "signals", "labels", "tokenizer"}


def test_tokens_decode_to_the_text_and_offsets_point_into_it(labelled):
    tokenizer = Tokenizer.from_file(str(labelled / "tokenizer" / "tokenizer.json"))
    for row in rows(labelled):
        assert tokenizer.decode(row["token_ids"], skip_special_tokens=False) == row["text"]
        assert row["token_starts"][0] == 0 and row["token_ends"][-1] == len(row["text"])
        lists = ("token_ids", "factual", "pos", "ent_type", "ref_nll", "ref_correct")
        assert len({len(row[name]) for name in lists}) == 1
        assert row["ref_nll"][0] is None and None not in row["ref_nll"][1:]


def test_the_share_is_the_budget_and_first_tokens_are_learned(labelled, labeller):
    tokens = json.loads((labelled / "manifest.json").read_text())["tokens"]
    for policy, budget in (("lacy", 0.05), ("loss", 0.15), ("random", 0.3)):
        done = labeller("decide", labelled, "--policy", policy, "--budget", budget, "--name", f"{policy}-{budget}")
        assert done.returncode == 0, done.stderr
        labels = [row["label"] for row in rows(labelled, f"labels/{policy}-{budget}")]
        assert sum(label.count(1) for label in labels) == round(budget * tokens)
        assert all(label[0] == 0 for label in labels)
    delegated = [(row["factual"], row["label"]) for row in rows(labelled, "labels/lacy-0.05")]
    assert all(not label or factual for pair in delegated for factual, label in zip(*pair, strict=True))


def test_labels_join_the_signals(labelled):
    for signals, labels in zip(rows(labelled), rows(labelled, "labels/lacy"), strict=True):
        assert all(signals[name] == labels[name] for name in ("doc_id", "token_ids", "factual", "ref_nll"))
        picked = [nll for nll, label in zip(labels["ref_nll"], labels["label"], strict=True) if label]
        kept = [
            nll
            for nll, label, factual in zip(labels["ref_nll"], labels["label"], labels["factual"], strict=True)
            if factual and not label and nll is not None
        ]
        threshold = json.loads((labelled / "labels" / "lacy" / "_policy.json").read_text())["threshold"]
        assert min(picked, default=threshold) >= threshold >= max(kept, default=threshold)


def test_check_is_satisfied_and_finds_damage(labelled, tmp_path, labeller):
    done = labeller("check", labelled)
    assert done.returncode == 0 and done.stdout.strip().endswith("sound")
    damaged = tmp_path / "damaged"
    shutil.copytree(labelled, damaged)
    signals = sorted((damaged / "signals").glob("*.parquet"))
    data = bytearray(signals[0].read_bytes())
    data[len(data) // 2] ^= 1
    signals[0].write_bytes(data)
    signals[1].unlink()
    labels = sorted((damaged / "labels" / "lacy").glob("*.parquet"))
    labels[2].write_bytes(labels[3].read_bytes())
    (damaged / "signals" / "part-stray.parquet").write_bytes(b"")
    done = labeller("check", damaged)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(signals[0].name in line and "checksum" in line for line in lines)
    assert any(signals[1].name in line and "missing" in line for line in lines)
    assert any(labels[2].name in line and "labels/lacy" in line and "checksum" in line for line in lines)
    assert any("part-stray" in line and "not in the manifest" in line for line in lines)


def test_a_finished_run_has_nothing_to_do(labelled, corpus, small_model):
    before = digests(labelled)
    started = time.monotonic()
    done = run_lacy(*arguments(corpus, labelled, small_model, "--workers", 2))
    assert done.returncode == 0, done.stderr
    assert digests(labelled) == before
    assert time.monotonic() - started < 60


def test_parts_that_were_lost_or_damaged_are_measured_again(labelled, corpus, small_model, tmp_path, labeller):
    damaged = Path(shutil.copytree(labelled, tmp_path / "d"))
    before = digests(damaged)
    plain, *_, cut, last = sorted((damaged / "signals").glob("*.parquet"))
    stream = next((damaged / "signals").glob("part-00001-*.parquet"))
    stream.unlink()
    plain.write_bytes(plain.read_bytes()[:-1])
    (damaged / "labels" / "lacy" / cut.name).unlink()
    done = labeller("check", damaged, "--quick")
    assert done.returncode == 1
    rerun = "rerun the lacy label command that made the dataset"
    assert f"signals/{stream.name}: missing: {rerun}" in done.stdout
    assert any(line.startswith(f"signals/{plain.name}: ") and rerun in line for line in done.stdout.splitlines())
    assert (
        f"labels/lacy/{cut.name}: missing: rerun lacy decide with the same --policy, --budget and --name" in done.stdout
    )
    command = arguments(corpus, damaged, small_model, "--workers", 1)
    done = labeller(*command)
    assert done.returncode == 0, done.stderr
    parts = len(json.loads((labelled / "manifest.json").read_text())["parts"])
    assert f"resuming: {parts - 2} parts are finished" in done.stderr
    assert digests(damaged) == before
    last.write_bytes(last.read_bytes() + b"x")
    assert labeller(*command).returncode == 0 and digests(damaged) == before


HEAVY = {"apache_beam", "spacy", "torch", "transformers"}


def heavy_imports(command: list[object]) -> set[str]:
    """The slow packages that a command imports in its own process."""
    code = f"""
import atexit, sys
from lacy.cli import main
atexit.register(lambda: print(*({HEAVY} & set(sys.modules))))
sys.argv = {["lacy", *map(str, command)]}
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_complete_run_repeated_imports_nothing_heavy(labelled, corpus, small_model):
    assert heavy_imports(arguments(corpus, labelled, small_model)) == set()


def test_grammar_alone_does_without_torch(small_model, tmp_path):
    corpus = corpora.write(tmp_path / "c.jsonl", corpora.documents(3, seed=4))
    command = ["label", corpus, "--out", tmp_path / "d", "--reference", "none", "--tokenizer", small_model]
    assert heavy_imports([*command, "--policy", "factual"]) == {"apache_beam", "spacy"}


def test_text_that_is_not_english_is_named(small_model, tmp_path, labeller):
    german = "Die kleine Stadt liegt am Ufer des Flusses und wurde nach dem Krieg von vielen Menschen verlassen. " * 5
    rows = [*corpora.documents(6, seed=5), {"id": "stadt", "text": german}]
    corpus = corpora.write(tmp_path / "c.jsonl", rows)
    command = ["label", corpus, "--out", tmp_path / "d", "--reference", "none", "--tokenizer", small_model]
    done = labeller(*command, "--policy", "factual", "--workers", 1)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0 and len(warnings) == 2  # before the work, and at its end
    assert "documents do not look English (the first is stadt)" in warnings[0] == warnings[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "factual", "--budget", "0.1"], "policy factual has no budget: leave out --budget"),
        (["--policy", "none", "--budget", "0.1"], "policy none has no budget: leave out --budget"),
        (["--policy", "loss"], "--reference none measures no loss, which policy loss needs: add --policy factual"),
        ([], "--reference none measures no loss, which policy lacy needs: add --policy factual"),
        (["--policy", "factual", "--window", "64"], "--window needs a --reference, and there is none"),
        (["--reference", "{model}", "--window", "257"], "--window 257 is longer than the model's context of 256"),
    ],
)
def test_options_that_do_nothing_are_refused(more, message, corpus, small_model, tmp_path, labeller):
    command = ["label", corpus, "--out", tmp_path / "d", "--reference", "none", "--tokenizer", small_model]
    done = labeller(*command, *(argument.format(model=small_model) for argument in more))
    assert done.returncode == 2 and message in done.stderr and len(told(done)) == 1
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_other_options_are_refused(labelled, corpus, small_model, labeller):
    before = digests(labelled)
    for more, message in (
        (["--attributes"], "--attributes false, not true"),
        (["--window", "64"], "--window null, not 64"),
        (["--limit", "5"], "--limit null, not 5"),
    ):
        done = labeller(*arguments(corpus, labelled, small_model, *more))
        assert (done.returncode, len(told(done))) == (2, 1)
        assert message in done.stderr
    done = labeller(*arguments(corpus / "a.jsonl", labelled, small_model))
    assert done.returncode == 2 and "other corpus files" in done.stderr
    assert digests(labelled) == before


@pytest.mark.slow
def test_three_workers_write_the_same_bytes(labelled, corpus, small_model, tmp_path):
    done = run_lacy(*arguments(corpus, tmp_path / "d", small_model, "--workers", 3))
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "d") == digests_of_a_fresh(labelled)


def digests_of_a_fresh(labelled: Path) -> dict[str, str]:
    """Without the label sets that other tests decided, which the card lists too."""
    files = {
        name: digest
        for name, digest in digests(labelled).items()
        if not name.startswith("labels/") or name.startswith("labels/lacy/")
    }
    fresh = card(read_complete(labelled), {"lacy": label_sets(labelled)["lacy"]})
    return files | {"README.md": hashlib.sha256(fresh.encode()).hexdigest()}


def test_killed_at_random_moments_and_run_again(labelled, corpus, small_model, tmp_path):
    random_ = random.Random(5)
    command = arguments(corpus, tmp_path / "d", small_model, "--workers", 2)
    parts: list[int] = []
    for number in range(2):  # while models load and streams are cut, and while parts are written
        process = subprocess.Popen(
            [LACY, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        more, pause = (random_.randint(1, 4), random_.uniform(0, 0.3)) if number % 2 else (0, random_.uniform(0.5, 5))
        _wait_for_parts(process, tmp_path / "d", (parts[-1] if parts else 0) + more)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        parts.append(len(list((tmp_path / "d" / ".parts").glob("*.json"))))
    assert parts == sorted(parts) and parts[0] < parts[-1]
    done = run_lacy(*command)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "d") == digests_of_a_fresh(labelled)


def test_a_killed_worker_ends_the_run_and_a_rerun_completes_it(labelled, corpus, small_model, tmp_path, labeller):
    command = arguments(corpus, tmp_path / "d", small_model, "--workers", 2)
    process = subprocess.Popen([LACY, *map(str, command)], stderr=subprocess.PIPE, text=True)
    _wait_for_parts(process, tmp_path / "d", 2)
    workers = _workers(process.pid)
    assert len(workers) >= 2
    workers[0].kill()
    killed = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - killed < 30
    assert "worker process was killed" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert not psutil.wait_procs(workers, timeout=5)[1]
    done = labeller(*command[:-1], 1)
    assert done.returncode == 0, done.stderr
    assert "resuming: " in done.stderr
    assert digests(tmp_path / "d") == digests_of_a_fresh(labelled)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_leaves_a_dataset_that_can_go_on(labelled, corpus, small_model, tmp_path, workers, labeller):
    command = arguments(corpus, tmp_path / "d", small_model, "--workers", workers)
    process = subprocess.Popen(
        [LACY, *map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )  # fmt: skip
    _wait_for_parts(process, tmp_path / "d", 2)
    children = _workers(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "rerun the same command to resume" in stderr and "Traceback" not in stderr
    assert not psutil.wait_procs(children, timeout=5)[1]
    for command_ in (["stats", tmp_path / "d"], ["check", tmp_path / "d"]):
        done = labeller(*command_)
        assert done.returncode == 1 and "not finished" in done.stderr
    done = labeller(*command[:-1], 1)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "d") == digests_of_a_fresh(labelled)


def test_two_runs_do_not_write_at_once(corpus, small_model, tmp_path, labeller):
    command = [LACY, *map(str, arguments(corpus, tmp_path / "d", small_model, "--workers", 1))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        _wait_for_parts(process, tmp_path / "d", 1)
        process.send_signal(signal.SIGSTOP)  # it holds the dataset however long the other takes to start
        done = labeller(*command[1:])
        assert done.returncode == 1 and "another run is writing" in done.stderr
    finally:
        process.kill()
        process.wait()


def _wait_for_parts(process: subprocess.Popen, dataset: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list((dataset / ".parts").glob("*.json"))) < count:
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _workers(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "sdk_worker_main" in " ".join(child.cmdline())]


# Bad input


@pytest.fixture(scope="module")
def bad_corpus(tmp_path_factory) -> tuple[Path, int, int]:
    """A folder of good and bad records, and how many of each it has."""
    folder = tmp_path_factory.mktemp("bad")
    good = corpora.documents(12, seed=20)
    lines = [
        b"{not json",
        b'{"id": "no-text"}',
        b'{"id": "number", "text": 5}',
        b'{"id": "empty", "text": ""}',
        b'{"id": "latin", "text": "caf\xe9"}',
        b'{"id": "surrogate", "text": "\\ud800"}',
    ]
    mixed = [line for pair in zip(lines, corpora.jsonl(good[:6]).splitlines(), strict=True) for line in pair]
    (folder / "a.jsonl").write_bytes(b"\n".join(mixed) + b"\n")
    (folder / "b.jsonl").write_bytes(
        corpora.jsonl([{"id": "nul", "text": "Ada\x00Byron was born in Leeds."}, good[0], *good[6:8], good[6]])
    )  # two duplicates: good[0] of another file, good[6] of this one
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(corpora.jsonl(corpora.documents(400, seed=21)))[:8000])
    (folder / "d.jsonl.bz2").write_bytes(bz2.compress(b"x" * 1000)[:20])
    path = corpora.write(folder / "e.parquet", corpora.documents(20, seed=22))
    path.write_bytes(path.read_bytes()[:-100])
    (folder / "f.txt").write_bytes(b"")
    (folder / "g.jsonl").write_bytes(b"")
    (folder / "h.jsonl").mkdir()
    (folder / "i.jsonl").symlink_to(folder / "nowhere")
    return folder, 6 + 1 + 2, 6 + 2 + 1 + 1 + 1 + 1


def test_bad_input_ends_as_dead_letters(bad_corpus, small_model, tmp_path, labeller):
    folder, good, bad = bad_corpus
    out = tmp_path / "d"
    done = labeller(*arguments(folder, out, small_model, "--workers", 1))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    lines = [line for path in sorted((out / "deadletter").iterdir()) for line in path.read_text().splitlines()]
    letters = [json.loads(line) for line in lines]
    assert {"not_json", "no_text", "text_of_another_type", "empty", "not_utf8", "duplicate", "unreadable"} < {
        letter["code"] for letter in letters
    }
    by_file: dict[str, list[str]] = {}
    for letter in letters:
        by_file.setdefault(Path(letter["source"]).name, []).append(letter["reason"])
    assert len(by_file.pop("a.jsonl")) == 6
    assert by_file.pop("b.jsonl") == ["the id occurs before in the corpus"] * 2
    assert by_file.pop("c.jsonl.gz")[0].startswith("gzip stream breaks off")
    assert by_file.pop("d.jsonl.bz2")[0].startswith("bzip2 stream breaks off")
    assert by_file.pop("e.parquet")[0].startswith("cannot read")
    assert by_file.pop("f.txt") == ["text is empty"]
    assert by_file == {}
    from_stream = sum("c.jsonl.gz" in row["source"] for row in rows(out))
    assert from_stream > 10
    assert manifest["documents"] == len(rows(out)) == good + from_stream
    assert manifest["bad"] == len(letters) == bad
    assert f"{bad} bad records" in done.stderr
    assert any(row["doc_id"] == "nul" and "\x00" in row["text"] for row in rows(out))
    assert labeller("check", out).returncode == 0


def test_max_bad_fails_the_run(bad_corpus, small_model, tmp_path, labeller):
    command = arguments(bad_corpus[0] / "a.jsonl", tmp_path / "d", small_model, "--workers", 1)
    done = labeller(*command, "--max-bad", "0.1")
    assert done.returncode == 1 and "6 of 12 records are bad" in done.stderr
    done = labeller(*command, "--max-bad", "0.6")
    assert done.returncode == 0, done.stderr


def test_corpora_without_a_document(small_model, tmp_path, labeller):
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "folder").mkdir()
    for corpus, message in (
        ("empty.jsonl", "the corpus is empty"),
        ("folder", "no file matches"),
        ("none.jsonl", "no file matches"),
    ):
        done = labeller(*arguments(tmp_path / corpus, tmp_path / f"d-{corpus}", small_model, "--workers", 1))
        assert done.returncode == 2 and len(told(done)) == 1
        assert message in done.stderr


@pytest.mark.slow
def test_a_document_of_five_megabytes_on_one_line(small_model, tmp_path):
    text = "".join(row["text"].replace("\n", " ") + " " for row in corpora.documents(14000, seed=4))[: 5 << 20]
    assert len(text) == 5 << 20
    around = corpora.documents(2, seed=30)
    corpora.write(tmp_path / "c.jsonl", [around[0], {"id": "big", "text": text}, around[1]])
    done = run_lacy(
        "label", tmp_path / "c.jsonl", "--out", tmp_path / "d", "--reference", "none", "--tokenizer", small_model,
        "--policy", "factual", timeout=560,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {row["doc_id"]: row for row in rows(tmp_path / "d")}
    assert set(found) == {"big", around[0]["id"], around[1]["id"]}
    assert found["big"]["text"] == text and found["big"]["token_ends"][-1] == len(text)
    assert 0.05 < np.mean(found["big"]["factual"]) < 0.6


def test_another_tokenizer_conserves_each_documents_loss(labelled, corpus, small_model, tmp_path, labeller):
    done = labeller("tokenizer", corpus, "--out", tmp_path / "large", "--vocab-size", 32_000)
    assert done.stdout.endswith("; --vocab-size 32,000 needs a larger corpus\n")
    done = labeller("tokenizer", corpus, "--out", tmp_path / "t", "--vocab-size", 400)
    assert done.returncode == 0 and "larger corpus" not in done.stdout, done.stderr
    other_tokens = ("--tokenizer", tmp_path / "t", "--workers", 1)
    done = labeller(*arguments(corpus / "a.jsonl", tmp_path / "d", small_model, *other_tokens))
    assert done.returncode == 0, done.stderr
    own = {row["doc_id"]: row for row in rows(labelled)}
    other = rows(tmp_path / "d")
    assert len(other) == 80 and len(other[0]["token_ids"]) > len(own[other[0]["doc_id"]]["token_ids"])
    for row in other:
        total = sum(nll for nll in row["ref_nll"] if nll is not None)
        assert total == pytest.approx(sum(own[row["doc_id"]]["ref_nll"][1:]), rel=1e-4, abs=1e-3)
        assert row["ref_nll"][0] is None
    assert labeller("check", tmp_path / "d").returncode == 0


@pytest.mark.slow
def test_a_student_adds_its_loss(corpus, small_model, tmp_path):
    out = tmp_path / "d"
    student = ("--student", small_model, "--policy", "gain", "--no-text")
    done = run_lacy(*arguments(corpus / "c.parquet", out, small_model, *student))
    assert done.returncode == 0, done.stderr
    for row in rows(out):
        assert row["student_nll"] == row["ref_nll"] and "text" not in row
    assert "student_nll" in rows(out, "labels/gain")[0]
    assert run_lacy("decide", out, "--policy", "rho", "--action", "ignore").returncode == 0
    assert {2, 0} == {label for row in rows(out, "labels/rho") for label in row["label"]}
    assert run_lacy("check", out).returncode == 0


def test_a_limit_takes_the_first_documents(corpus, small_model, tmp_path, labeller):
    done = labeller(*arguments(corpus, tmp_path / "d", small_model, "--limit", 90, "--workers", 1))
    assert done.returncode == 0, done.stderr
    expected = [row["id"] for row in corpora.documents(80, 1) + corpora.documents(50, 2)[:10]]
    assert [row["doc_id"] for row in rows(tmp_path / "d")] == expected
