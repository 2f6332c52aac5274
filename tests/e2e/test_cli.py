"""The command line: help at once, and one line for every mistake."""

import pytest

from lacy import __version__
from tests.conftest import run_lacy, told
from tests.pipeline import corpora

COMMANDS = ["label", "decide", "check", "status", "stats", "sql", "show", "tokenizer", "models", "models get"]


def test_help_names_every_command():
    done = run_lacy("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS if " " not in command)


def test_the_version_needs_no_command():
    done = run_lacy("--version")
    assert (done.returncode, done.stdout) == (0, f"lacy {__version__}\n")


def test_help_loads_nothing_heavy():
    """What makes `lacy --help` quick; its time is no matter for a test."""
    import subprocess
    import sys

    code = "import sys, lacy.cli; print([m for m in sys.modules if m.split('.')[0] in %r])"
    heavy = {"numpy", "pyarrow", "duckdb", "apache_beam", "spacy", "torch", "transformers", "pydantic", "schemas"}
    done = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, labeller):
    done = labeller(*command.split(), "--help")
    assert (done.returncode == 0 and "Example" in done.stdout) or command in ("models", "label")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpora.write(tmp_path_factory.mktemp("c") / "c.jsonl", corpora.documents(4))


@pytest.fixture(scope="module")
def labelled(corpus, small_model, tmp_path_factory, labeller):
    out = tmp_path_factory.mktemp("labelled") / "d"
    done = labeller("label", corpus, "--out", out, "--reference", small_model, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return out


MISTAKES = [
    (["label", "nowhere.jsonl", "--out", "d"], 1, "no file matches nowhere.jsonl"),
    (["label", "{corpus}", "--out", "d", "--policy", "best"], 1, "unknown policy 'best'"),
    (["label", "{corpus}", "--out", "d", "--policy", "gain", "--reference", "{model}"], 1, "--student MODEL"),
    (["label", "{corpus}", "--out", "d", "--action", "drop"], 1, "unknown action 'drop'"),
    (["label", "{corpus}", "--out", "d", "--scorer", "magic"], 2, "--scorer"),
    (["label", "{corpus}", "--out", "d", "--scorer", "server"], 2, "--scorer server needs --server URL"),
    (["label", "{corpus}", "--out", "d", "--judge-server", "http://h"], 2, "--judge-server needs --judge"),
    (["label", "{corpus}", "--out", "d", "--engine-arg", "x"], 2, "'x' is not key=value"),
    (
        ["label", "{corpus}", "--out", "d", "--reference", "{model}", "--engine-arg", "a=1"],
        1,
        "--engine-arg is for vLLM",
    ),
    (["label", "{corpus}", "--out", "d3", "--reference", "{model}", "--server", "ftp://h"], 1, "is no server's URL"),
    (
        ["label", "{corpus}", "--out", "d4", "--reference", "{model}", "--server", "http://127.0.0.1:9"],
        1,
        "no server answers",
    ),
    (["label", "{corpus}", "--out", "d", "--policy", "judge", "--reference", "{model}"], 1, "--judge MODEL"),
    (["label", "{corpus}", "--out", "d", "--reference", "none"], 2, "--reference none needs --tokenizer"),
    (["label", "{corpus}", "--out", "d", "--reference", "/no/model"], 1, "/no/model"),
    (["label", "{corpus}", "--out", "d", "--reference", "{model}", "--tokenizer", "/no/tokenizer"], 1, "/no/tokenizer"),
    (["label", "{corpus}", "--out", "d1", "--reference", "{model}", "--spacy", "xx_none"], 1, "not installed"),
    (["label", "{corpus}", "--out", "d2", "--reference", "{model}", "--window", "999"], 1, "longer than the model's"),
    (["label", "{corpus}", "--out", "d", "--window", "8", "--overlap", "9"], 2, "--overlap 9 must be less"),
    (["label", "{corpus}", "--out", "{corpus_folder}", "--reference", "{model}"], 1, "has files in it"),
    (["decide", "{labelled}", "--policy", "rho"], 1, "--student MODEL"),
    (["decide", "{labelled}", "--policy", "loss", "--name", "../x"], 1, "cannot name a label set"),
    (["decide", "nowhere", "--policy", "loss"], 1, "nowhere is not a dataset"),
    (["check", "nowhere"], 1, "nowhere is not a dataset"),
    (["stats", "nowhere"], 1, "nowhere is not a dataset"),
    (["stats", "{labelled}", "--labels", "none-such"], 1, "none-such"),
    (["sql", "{labelled}", "SELEC 1"], 1, "syntax error"),
    (["sql", "{labelled}", "SELECT nothing FROM tokens"], 1, "nothing"),
    (["tokenizer", "nowhere", "--out", "t"], 1, "no file matches"),
    (["models", "get", "gpt-9"], 1, "no embedded model 'gpt-9'"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_line(arguments, code, message, corpus, labelled, small_model, tmp_path, labeller):
    names = {"corpus": corpus, "corpus_folder": corpus.parent, "labelled": labelled, "model": small_model}
    done = labeller(*[argument.format(**names) for argument in arguments], cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert len(told(done)) == 1 and len(done.stderr) < 500 and done.stdout == ""


def test_a_missing_argument_is_told_by_its_name():
    done = run_lacy("label")
    assert done.returncode == 2 and "CORPUS" in done.stderr


def test_sql_formats(labelled, labeller):
    query = "SELECT count(*) AS documents FROM documents"
    assert "documents" in labeller("sql", labelled, query).stdout
    assert labeller("sql", labelled, query, "--format", "csv").stdout.split() == ["documents", "4"]
    assert '"documents": 4' in labeller("sql", labelled, query, "--format", "json").stdout.replace('":4', '": 4')


def test_stats_as_json(labelled, labeller):
    import json

    found = json.loads(labeller("stats", labelled, "--json").stdout)
    manifest = json.loads((labelled / "manifest.json").read_text())
    assert (found["documents"], found["tokens"]) == (manifest["documents"], manifest["tokens"])
