"""Every command and every piece of Python in the README and in docs/ runs as it stands there.

Names that a reader would replace by their own stand for small things here: a corpus, a model made from a config.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import corpora

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_ENGINE = r"--scorer vllm|--server|--judge"  # tests/e2e/test_engines.py and others run these for a minute each
ELSEWHERE = ("pip install", "make ", "gs://", "pre-commit")  # an installation, a cluster; make is what runs this


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    found = [line for line in lines if re.match(r"(lacy|python|pip|make|pre-commit) \S", line)]
    return [line for line in found if not any(word in line for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def ran() -> set[str]:
    return set()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, small_model) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    rows = corpora.documents(12, seed=40)
    corpora.write(folder / "corpus" / "a.jsonl.gz", rows)
    gold = [row | {"gold": [[0, 3]], "covered": [[0, len(row["text"])]]} for row in rows]
    (folder / "gold.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in gold).encode()))
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    (folder / "models").mkdir()
    (folder / "models" / "small").symlink_to(small_model)
    done = run(folder, "lacy label corpus --out before --reference models/small")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def labelled(workplace) -> None:
    """What a reader has who has labelled a corpus before."""
    run(workplace, "rm -rf labelled gold && cp -r before labelled")


def run(workplace: Path, command: str) -> subprocess.CompletedProcess[str]:
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", command], cwd=workplace, env=environment, capture_output=True, text=True, timeout=200
    )


def as_here(command: str) -> str:
    """The small model for the reader's; the examples of `lacy label` all write to a new folder of the same name."""
    command = re.sub(r"--reference (?!none)\S+", "--reference models/small", command)
    command = re.sub(r"--gt-tokens \d+", "--gt-tokens 3000", command)
    if command.startswith("lacy label"):
        command = f"rm -rf labelled && {command}" + ("" if "--reference" in command else " --reference models/small")
    return command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page(workplace, ran, page):
    run(workplace, "rm -rf run run-*")
    found = commands(page)
    needs_tokenizer = any("my-tokenizer" in command for command in found)
    if needs_tokenizer:  # the page trains it after it is first named
        found.sort(key=lambda command: not command.startswith("lacy tokenizer"))
    found = [
        command for command in found if not re.search(r"benchmarks/(label|score|train|mfu)\.py", command)
    ]  # make bench
    for command in found:
        if as_here(command).startswith("rm -rf labelled") and as_here(command) in ran:
            continue  # another page's, or another's model, for which the small one stands too
        ran.add(as_here(command))
        if re.search(NEEDS_ENGINE, command):
            done = run(workplace, as_here(command) + " --estimate --limit 1")
            assert "leave out --limit" in done.stderr, f"{command}\n{done.stderr}"  # read to the end, and understood
            continue
        done = run(workplace, as_here(command))
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page(workplace, page, small_model):
    for block in blocks(page, "python"):
        block = block.replace('out=Path("labelled")', f'out=Path("labelled"), reference={str(small_model)!r}')
        if "annotate" in block:
            run(workplace, "rm -rf labelled")
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=workplace, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
