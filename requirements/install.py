"""Make .venv and install a lock into it.  Run by `make demo` and `make test`; needs Python and pip alone.

    python requirements/install.py demo [test ...]

uv does the installing: the one that the machine has, or one that pip fetches into .uv/. torch comes as PyTorch's build
for CPUs where that can be reached, or where pip is configured to find one; else as the package index has it, which on
Linux brings CUDA along: some 5 GB more to keep, and nothing that CPUs would need. What pip is configured to use
(PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf, ...), uv uses too.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv"
PYTHONS = (3, 11), (3, 13)
UV_NAMES = {  # what pip calls it, and what uv does
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
}
NO_DEPENDENCIES = {"test": ("vllm",)}  # locks to install beside one, without what their packages ask for


def main(locks: list[str]) -> None:
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        sys.exit("lacy needs Python 3.11, 3.12 or 3.13, for example: make PYTHON=python3.12")
    uv, environment = find_uv(), uv_environment()

    def run(*arguments: str) -> int:
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        return subprocess.run([uv, *arguments, *quiet], env=environment, cwd=ROOT).returncode

    if not (VENV / "bin" / "python").exists() and run("venv", "--seed", "--python", sys.executable, str(VENV)):
        sys.exit(1)
    for lock in locks:
        print(f"Installing requirements/{lock}.lock into .venv", flush=True)
        wanted = ["pip", "install", "--requirement", f"requirements/{lock}.lock"]
        cpu = [*wanted, "--torch-backend=cpu"]
        probe = subprocess.run(
            [uv, *cpu, "--dry-run"], env=environment | {"UV_HTTP_RETRIES": "1"}, cwd=ROOT, capture_output=True
        )
        if probe.returncode == 0:
            wanted = cpu
        else:
            print("PyTorch's builds for CPUs cannot be reached; taking torch from the package index", flush=True)
        if run(*wanted):
            sys.exit(1)
        for other in NO_DEPENDENCIES.get(lock, ()):
            if run("pip", "install", "--no-deps", "--requirement", f"requirements/{other}.lock"):
                sys.exit(1)
    if run("pip", "install", "--no-deps", "--editable", "."):
        sys.exit(1)


def find_uv() -> str:
    """The uv of this machine, else one in the checkout."""
    mine = ROOT / ".uv" / "bin" / "uv"
    if found := shutil.which("uv") or (mine.exists() and str(mine)):
        return found
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--root-user-action=ignore",
    ]
    if subprocess.run([*command, "--target", str(mine.parent.parent), "uv>=0.9"]).returncode:
        sys.exit("uv cannot be fetched by pip; install uv, or pip, and try again")
    return str(mine)


def uv_environment() -> dict[str, str]:
    """This environment, with pip's configuration in uv's words, and .venv as the place to install into."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    # global.index-url='https://...', or :env:.index-url='...', which goes before
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        if name := UV_NAMES.get(key.rpartition(".")[2]):
            found[name] = ("," if name == "UV_FIND_LINKS" else " ").join(ast.literal_eval(value).split())
    return found | os.environ | {"VIRTUAL_ENV": str(VENV)}


if __name__ == "__main__":
    main(sys.argv[1:])
