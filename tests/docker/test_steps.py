"""Every step of the images, in empty virtual environments and with an installed package index: minutes.

A small stand-in for an engine follows a Dockerfile: it copies, sets and runs what stands there, in a folder. What needs
a machine of its own (a user, a compiler from Debian) only `test_build.py` runs.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.docker.dockerfiles import DOCKER, ROOT, pins, stages
from tests.support import corpora

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ELSEWHERE = r"useradd|docker/install-compiler\.sh"
OFFLINE = ["unshare", "--net"] if os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip") else []
LOOPBACK = 'ip link set lo up && exec "$@"'


class Image:
    """A folder that stands for a file system, with a virtual environment for its Python."""

    def __init__(self, folder: Path, context: Path):
        self.root, self.context = folder, context
        self.workdir = folder
        self.environment = {"HOME": str(folder / "home"), "PATH": f"{folder}/venv/bin:{os.environ['PATH']}"}
        self.environment |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        for kind in ("home", "source"):
            (folder / kind).mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        subprocess.run([folder / "venv/bin/pip", "install", "-q", "pip==24.0"], check=True)  # of python:3.11

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/") if name.startswith("/") else self.workdir / name

    def build(self, instructions: list[tuple[str, str]]) -> None:
        for keyword, text in instructions:
            text = re.sub(r"\$\{(\w+)\}", lambda match: self.environment[match[1]], text)
            if keyword == "WORKDIR":
                self.workdir = self.path(text)
                self.workdir.mkdir(parents=True, exist_ok=True)
            elif keyword in ("ARG", "ENV"):
                self.set(text)
            elif keyword == "COPY":
                self.copy(text.split())
            elif keyword == "RUN" and not re.match(ELSEWHERE, text):
                if "target=/source" in text:
                    shutil.copytree(self.context, self.root / "source", symlinks=True, dirs_exist_ok=True)
                text = re.sub(r"--mount=\S+ ", "", text).replace(" /source", f" {self.root}/source")
                done = self.run("bash", "-c", text, cwd=self.workdir)
                assert done.returncode == 0, f"RUN {text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def set(self, text: str) -> None:
        for word in shlex.split(text):
            name, _, value = word.partition("=")
            self.environment[name] = str(self.path(value)) if value.startswith("/") else value

    def copy(self, words: list[str]) -> None:
        stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
        *sources, target = words
        for source in sources:
            if stage in ("beam", "launcher"):
                continue
            found = self.context / source if stage is None else self.path(source)
            if found.is_dir():
                shutil.copytree(found, self.path(target), dirs_exist_ok=True)
            else:
                self.path(target).mkdir(parents=True, exist_ok=True)
                shutil.copy(found, self.path(target))

    def run(self, *command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = list(map(str, command))
        return subprocess.run(
            words, cwd=cwd or self.root / "home", env=self.environment, capture_output=True, text=True
        )

    def offline(self, *command: object) -> subprocess.CompletedProcess[str]:
        return self.run(*OFFLINE, *(["bash", "-c", LOOPBACK, "-"] if OFFLINE else []), *command)

    def packages(self) -> dict[str, str]:
        found = [line.split("==") for line in self.run("pip", "list", "--format=freeze").stdout.splitlines()]
        return {normal(name): version.partition("+")[0] for name, version in found} | {"pip": ""}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Path:
    """The files of the project that .dockerignore leaves."""
    folder = tmp_path_factory.mktemp("context")
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        ignored = False
        for pattern in patterns:
            if any(fnmatch(part, pattern.lstrip("!")) for part in [name, *map(str, Path(name).parents)]):
                ignored = pattern[0] != "!"
        if not ignored and ((ROOT / name).is_file() or (ROOT / name).is_symlink()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def worker(tmp_path_factory, context) -> Image:
    image = Image(tmp_path_factory.mktemp("worker"), context)
    every = stages(DOCKER / "label.Dockerfile")
    image.build(every["baked"])
    for package in ("lacy", "labelers", "schemas"):  # which stay behind in that stage
        shutil.rmtree(image.workdir / package)
    image.build([("ENV", text) for keyword, text in every["base"] if keyword == "ENV"])
    image.build(every["cpu"][len(every["packages-cpu"]) :])
    shutil.rmtree(image.root / "baked")
    return image


@pytest.fixture(scope="module")
def labelled(worker) -> Path:
    """Labelled by two of Beam's workers, which have no network but their own."""
    corpus = corpora.write(worker.root / "home" / "c.jsonl", corpora.documents(3, seed=1))
    done = worker.offline("lacy", "label", corpus, "--out", "labelled", "--workers", "2")
    assert done.returncode == 0, done.stderr
    return worker.root / "home" / "labelled"


def test_a_worker_has_the_packages_of_its_lock(worker):
    expected = {normal(name): version for name, version in pins("label.lock").items()}
    assert worker.packages() == expected | {"lacy": "0.1.0", "pip": ""}


def test_a_worker_downloads_nothing(worker, labelled):
    if OFFLINE:
        refused = worker.offline("pip", "download", "--no-deps", "--no-cache-dir", "lacy-is-no-package")
        assert refused.returncode != 0
    done = worker.offline("lacy", "check", labelled)
    assert done.returncode == 0 and "3 documents" in done.stdout


def test_the_template_calls_the_command(worker):
    given = ["--corpus=gs://bucket/c.jsonl", "--out=here", "--image=i", "--project=p", "--region=r"]
    done = worker.run("python", worker.environment["FLEX_TEMPLATE_PYTHON_PY_FILE"], *given, "--runner=DataflowRunner")
    assert done.returncode == 2 and "here is on this machine" in done.stderr


def test_the_gpu_packages_can_be_installed(worker):
    """The resolution alone: they take 10 GB and a GPU."""
    done = worker.run("pip", "install", "--dry-run", "--requirement", worker.context / "requirements/gpu.lock")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "vllm-0.32.0" in done.stdout.rpartition("Would install")[2]


def test_training_runs_under_torchrun(tmp_path_factory, context, labelled):
    image = Image(tmp_path_factory.mktemp("trainer"), context)
    image.build(stages(DOCKER / "train.Dockerfile")["train"])
    expected = {normal(name): version for name, version in pins("train.lock").items()}
    assert image.packages() == expected | {"lacy": "0.1.0", "pip": ""}
    command = [
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "2",
        "-m",
        "lacy",
        "train",
        labelled,
        "--out",
        "run",
    ]
    done = image.offline("torchrun", *command, "--model", "tiny", "--context", "64", "--max-steps", "2", "--batch", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((image.root / "home/run/checkpoints").iterdir())
