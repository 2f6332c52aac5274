"""The images themselves, built by Buildah, an engine without a daemon, and run with no network: minutes.

Base images come from registries. Debian with its Python, from Debian's packages, stands for Python's image, and a
script for what is copied from Beam's and the launcher's. Needs root, and apt-get install buildah debootstrap.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.dockerfiles import ROOT
from tests.support import corpora

NEEDS = ("buildah", "debootstrap", "ip", "unshare")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, NEEDS)), reason=f"needs root, {', '.join(NEEDS)}"
    ),
]
PACKAGES = "ca-certificates,python3,python3-pip,python3-venv"
BOOT = "#!/bin/sh\nexec python -m apache_beam.runners.worker.sdk_worker_main\n"


class Engine:
    """Buildah with a storage of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.volumes: list[str] = []

    def __call__(self, *arguments: object, before: tuple[str, ...] = ()) -> str:
        command = [*before, "buildah", "--root", self.folder / "root", "--runroot", self.folder / "run", *arguments]
        environment = os.environ | {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return done.stdout.strip()

    def image(self, folder: Path, name: str) -> None:
        container = self("from", "scratch")
        self("add", container, folder, "/")
        self("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self("commit", "--quiet", "--rm", container, name)

    def build(self, name: str, *arguments: str) -> str:
        bases = ["PYTHON_IMAGE=localhost/python", "BEAM_IMAGE=localhost/beam", "LAUNCHER_IMAGE=localhost/beam"]
        given = [word for base in bases for word in ("--build-arg", base)] + self.volumes
        self("bud", "--pull=never", "--quiet", "--tag", name, *given, *arguments, ".")
        return name

    def run(self, image: str, folder: Path, script: str) -> str:
        """As a user that is not root, in a network namespace with nothing but a loopback."""
        container = self("from", "--pull=never", image)
        alone = ("unshare", "--net", "bash", "-c", 'ip link set lo up && exec "$@"', "-")
        options = ("--user", "1000", "--volume", f"{folder}:/work", "--workingdir", "/work", "--env", "HOME=/tmp")
        try:
            return self("run", *options, container, "--", "sh", "-euc", script, before=alone)
        finally:
            self("rm", container)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    engine = Engine(folder)
    system = folder / "debian"
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", system], check=True)
    next(system.glob("usr/lib/python3*/EXTERNALLY-MANAGED")).unlink()
    (system / "usr/bin/python").symlink_to("python3")
    engine.volumes = configure_pip(system)
    engine.image(system, "localhost/python")
    for file in ("opt/apache/beam/boot", "opt/google/dataflow/python_template_launcher"):
        path = folder / "beam" / file
        path.parent.mkdir(parents=True)
        path.write_text(BOOT)
        path.chmod(0o755)
    engine.image(folder / "beam", "localhost/beam")
    shutil.rmtree(system)
    yield engine
    engine("rm", "--all")
    engine("rmi", "--all", "--force")


def configure_pip(system: Path) -> list[str]:
    """Gives a system this machine's package index; returns the folders of it, as volumes."""
    listed = subprocess.run(["pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    pairs = [line.partition("=")[::2] for line in listed.splitlines()]
    values = {name.rpartition(".")[2]: value.strip("'").replace("\\n", " ") for name, value in pairs}
    values = {name: values[name] for name in ("cert", "index-url", "extra-index-url", "find-links") if name in values}
    if certificates := values.get("cert"):
        shutil.copy(certificates, system / "etc/ssl/certs/ca-certificates.crt")
        values["cert"] = "/etc/ssl/certs/ca-certificates.crt"
    text = "".join(f"{name} = {value}\n" for name, value in values.items())
    (system / "etc/pip.conf").write_text(f"[global]\n{text}")
    words = [word.removeprefix("file://") for value in values.values() for word in value.split()]
    folders = {"/".join(word.split("/")[:3]) for word in words if Path(word).is_dir()}
    return [word for folder in sorted(folders) for word in ("--volume", f"{folder}:{folder}:ro")]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    corpora.write(folder / "c.jsonl", corpora.documents(3, seed=1))
    folder.chmod(0o777)
    for parent in folder.parents[:2]:  # pytest's own
        parent.chmod(0o755)
    return folder


def test_a_worker_labels(engine, work):
    image = engine.build("lacy-label:cpu", "--file", "docker/label.Dockerfile", "--target", "cpu")
    told = engine.run(
        image, work, "id -u; ls -A /opt/lacy; lacy label c.jsonl --out labelled --workers 2; lacy check labelled"
    )
    user, *files, checked = told.splitlines()
    assert user == "1000" and files == ["docker", "home", "requirements"]
    assert "3 documents" in checked and checked.endswith("sound")
    packages = engine.run(image, work, "python -m pip inspect")
    assert '"apache-beam"' in packages


def test_training_runs(engine, work):
    image = engine.build("lacy-train", "--file", "docker/train.Dockerfile")
    command = "-m lacy train labelled --out run --model tiny --context 64 --max-steps 2 --batch 1"
    engine.run(image, work, f"gcc --version; torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 {command}")
    assert (work / "run" / "checkpoints").is_dir()
