"""The Python API, in a script as a user writes it: without a __main__ guard, in a process of its own."""

import inspect
import subprocess
import sys

import pytest

import lacy
from lacy.trainer.config import TrainConfig
from tests.support import corpora

SCRIPT = """
import logging
print("main runs", flush=True)
import lacy

lines = []
given = {"tokenizer": MODEL, "reference": "none", "policy": "factual", "part_bytes": 1024}
manifest = lacy.label("corpus.jsonl", "labelled", workers=2, progress=lines.append, **given)
assert (manifest.state, manifest.documents, len(manifest.parts) > 1) == ("complete", 20, True)
assert lines[-1].startswith("labels/factual: ") and any("20 documents" in line for line in lines), lines
assert lacy.label("corpus.jsonl", "labelled", progress=False, **given) == manifest

labels = lacy.decide("labelled", "random", budget=0.2, seed=3)
assert labels.name == "random" and abs(labels.share - 0.2) < 0.01
with lacy.connect("labelled") as connection:
    assert connection.execute("SELECT count(*) FROM tokens").fetchone() == (manifest.tokens,)

sizes = {"model": "tiny", "context": 32, "batch": 2, "holdout": 0.3, "loader_workers": 1}
run = lacy.train("labelled", "run", max_steps=2, labels="random", objective="lacy-static", progress=False, **sizes)
assert lacy.train("labelled", "run", max_steps=3, labels="random", resume=True, progress=False) == run
generations = lacy.generate(run, ["Ada", "Otto"], partner="none", max_new_tokens=4, progress=False)
assert [generation.prompt for generation in generations] == ["Ada", "Otto"]
assert logging.getLogger().isEnabledFor(logging.WARNING), "the script's own logs are not silenced"
print("done")
"""


def test_a_script_without_a_guard(tmp_path, small_model):
    corpora.write(tmp_path / "corpus.jsonl", corpora.documents(20))
    (tmp_path / "script.py").write_text(SCRIPT.replace("MODEL", repr(str(small_model))))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "main runs\ndone\n" and done.stderr == "", "workers neither import the script nor print"


def test_importing_lacy_is_light():
    code = (
        "import sys, lacy; print([m for m in sys.modules if m.split('.')[0] in ('pydantic', 'rich', 'typer', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert set(lacy.__all__) <= set(dir(lacy))
    with pytest.raises(AttributeError, match="no attribute 'lable'"):
        _ = lacy.lable


def test_signatures_show_the_options():
    parameters = inspect.signature(lacy.train).parameters
    assert parameters.keys() == TrainConfig.model_fields.keys() | {"config", "resume", "progress"}
    assert parameters["budget"].default == TrainConfig.model_fields["budget"].default


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lacy.label("nowhere.jsonl", "d"), "no file matches nowhere.jsonl"),
        (lambda: lacy.label("nowhere.jsonl", "d", budgt=1), "unknown option: budgt"),
        (lambda: lacy.label("nowhere.jsonl", "d", max_bad=2), "--max-bad: "),
        (lambda: lacy.decide("nowhere", "best"), "--policy: "),
        (lambda: lacy.decide("nowhere", "loss"), "nowhere is not a dataset"),
        (lambda: lacy.train("nowhere", "run", objective="lcy"), "--objective: "),
        (lambda: lacy.generate("nowhere", "x", top_p=0), "--top-p: "),
        (lambda: lacy.connect("nowhere"), "nowhere is not a dataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_a_known_error(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lacy.LacyError, match=message) as raised:
        call()
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
