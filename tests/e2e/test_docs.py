"""The README and docs/ are true: every command, Python block and notebook cell runs, and every link resolves.

Names that a reader would replace, such as a corpus or a model, are replaced here by small real ones.
"""

import errno
import gzip
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.support import corpora
from tests.support.forks import Forks
from tests.test_architecture import MAY_IMPORT

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.ipynb"))]
SOURCES = [
    path
    for folder in ("schemas", "labelers", "pipeline", "stats", "trainer", "cascade", "lacy", "requirements")
    for path in (ROOT / folder).rglob("*.py")
]
# tests/e2e/test_engines.py and others run these for a minute each
NEEDS_ENGINE = r"lacy label .*(--scorer vllm|--server|--judge)"
# make bench runs these, and tests/e2e/test_paper.py the last
LONG = r"benchmarks/(label|score|stats|train|mfu|cascade)\.py|experiments/paper\.py"
TRAINED = "lacy train labelled --out trained --model tiny --context 128 --holdout 0.5 --gt-tokens 3000"
SEED = 40
DOCUMENT = str(corpora.documents(1, seed=SEED)[0]["id"])
NEW = "rm -rf labelled && "
# Installations, clusters, stores (tests/stores has such commands), and make, which runs this test.
ELSEWHERE = ("pip install", "make ", "gs://", "s3://", "pre-commit", "--on ")
NOT_IN_THE_LOCKS = ("polars",)  # packages of Python blocks that need not be installed


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    found = [line for line in lines if re.match(r"(lacy|python|pip|make|pre-commit) \S", line)]
    return [line for line in found if not any(word in line for word in ELSEWHERE)]


def files(page: Path) -> dict[str, str]:
    """Text by file name, for each block below a line that ends with the name of a file and a colon."""
    return dict(
        re.findall(r"`(\S+\.(?:txt|yaml|jsonl))`:\n\n```\w*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    )


@pytest.fixture(scope="module", params=PAGES, ids=lambda page: page.name)
def page(request) -> Path:
    """A page; of module scope, so that its Python blocks run after its commands and find their output."""
    return request.param


@pytest.fixture(scope="module")
def ran() -> set[str]:
    return set()


@pytest.fixture(scope="module")
def closed_server() -> Iterator[str]:
    """The URL of a server that refuses every key."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def do_POST(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, small_model) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    rows = corpora.documents(12, seed=SEED)
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
    """A dataset from an earlier run, which most pages assume."""
    run(workplace, "rm -rf labelled gold && cp -r before labelled")


def quickly(forks: tuple[Forks, Forks], workplace: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Like `run`, but a plain `lacy` command runs in a fork that has the imports already."""
    if command.startswith(NEW):
        run(workplace, "rm -rf labelled")
        command = command.removeprefix(NEW)
    if not re.match("lacy (?!models)", command) or re.search(r"&&|[|>]", command):
        return run(workplace, command)
    lacy, labeller = forks
    labels = re.match("lacy (label|decide|tokenizer|check|stats|sql|show|report)", command)
    return (labeller if labels else lacy)(*shlex.split(command)[1:], cwd=workplace)


def run(workplace: Path, command: str) -> subprocess.CompletedProcess[str]:
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(workplace / ".datasets"),
    }
    return subprocess.run(
        ["bash", "-c", command], cwd=workplace, env=environment, capture_output=True, text=True, timeout=200
    )


def as_here(command: str) -> str:
    """The command with the small model for the reader's, and with a new folder for each `lacy label`."""
    command = re.sub(r"--reference (?!none)\S+", "--reference models/small", command)
    command = command.replace("DOC_ID", DOCUMENT)
    command = re.sub(r"--gt-tokens \d+", "--gt-tokens 3000", command)
    command = re.sub(r"--partner (?!none|http)\S+", "--partner models/small", command)
    command = re.sub(r"^lacy compare( \w\S*)+", "lacy compare run run", command)
    if re.match(r"lacy (generate|eval factscore)", command) and "--partner" not in command:
        command += " --partner models/small"
    if command.startswith("lacy label"):
        command = f"{NEW}{command}" + ("" if "--reference" in command else " --reference models/small")
        command += "" if "--workers" in command else " --workers 1"
    return command


def test_the_commands_of_a_page(workplace, ran, page, closed_server, lacy, labeller):
    forks = lacy, labeller
    run(workplace, "rm -rf run run-*")
    found = commands(page)
    named = {" ".join(command.split()[:2]) for command in found}
    if named & {"lacy generate", "lacy eval"} and "lacy train" not in named:  # the page takes a run for granted
        done = run(workplace, f"[ -d trained ] || {TRAINED} && cp -r trained run")
        assert done.returncode == 0, done.stderr
    for name, text in files(page).items():
        (workplace / name).write_text(text)
    needs_tokenizer = any("my-tokenizer" in command for command in found)
    if needs_tokenizer:  # the page trains it after it is first named
        found.sort(key=lambda command: not command.startswith("lacy tokenizer"))
    for command in [command for command in found if not re.search(LONG, command)]:
        if as_here(command).startswith(NEW) and as_here(command) in ran:
            continue  # another page's, or another's model, for which the small one stands too
        ran.add(as_here(command))
        if re.search(NEEDS_ENGINE, command):
            done = run(workplace, as_here(command) + " --estimate --limit 1")
            assert "leave out --limit" in done.stderr, f"{command}\n{done.stderr}"  # read to the end, and understood
            continue
        if "http://" in command:
            done = quickly(forks, workplace, re.sub(r"http://[^\s,]+", closed_server, as_here(command)))
            assert done.returncode == 1 and done.stderr.startswith("lacy: "), f"{command}\n{done.stderr}"
            assert re.search("401|refused the key", done.stderr)  # it came as far as the server
            continue
        done = quickly(forks, workplace, as_here(command))
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


def test_the_python_of_a_page(workplace, page, small_model):
    for block in blocks(page, "python"):
        block = block.replace('out=Path("labelled")', f'out=Path("labelled"), reference={str(small_model)!r}')
        block = block.replace("meta-llama/Llama-3.2-1B", str(small_model))
        if any(f"import {name}" in block and not importlib.util.find_spec(name) for name in NOT_IN_THE_LOCKS):
            continue
        if "lacy.label(" in block:
            run(workplace, "rm -rf labelled")
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=workplace,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(workplace / ".datasets")},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_plans_are_what_the_command_prints(workplace):
    """docs/scale.md shows a plan below its command, and last all rates."""
    text = (ROOT / "docs" / "scale.md").read_text()
    shown = re.findall(
        r"^```\n(lacy plan [^\n]+)\n```\n(?:[^`]*\n)?```\n(tokens .*?)\n```$", text, re.MULTILINE | re.DOTALL
    )
    assert len(shown) == 4
    for command, plan in shown:
        done = run(workplace, f"COLUMNS=120 {command}")
        printed = "\n".join(line.rstrip() for line in done.stdout.splitlines())
        assert printed.startswith(plan), command
    rates = printed.partition("replaces any)\n")[2]
    assert f"```\n{rates.strip()}\n```" in text


def test_the_example_of_a_generation_has_its_fields():
    from lacy.cascade.generate import Generation, Token

    [example] = [json.loads(block) for block in blocks(ROOT / "docs" / "cascade.md", "json")]
    generation = Generation.model_validate(example)
    assert example.keys() == Generation.model_fields.keys()
    assert all(token.keys() == Token.model_fields.keys() for token in example["tokens"])
    assert generation.text == "".join(token.text for token in generation.tokens)
    assert generation.calls == sum(token.called for token in generation.tokens)


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda path: path.name)
def test_the_cells_of_a_notebook_run_in_order(notebook, small_model, tmp_path):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] for cell in cells[1:]), "the notebook is kept with its output"
    code = "\n".join("".join(cell["source"]) for cell in cells).replace("smollm2-135m", str(small_model))
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("tokens delegated") == 2 and "Odra Venn" in done.stdout.replace("[", "").replace("]", "")


def test_links_resolve():
    """Relative links lead to files of the repository, and anchors to headings."""
    for page in TEXTS:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
                assert anchor in anchors, f"{page.name}: {target}#{anchor}"


def test_cited_files_exist():
    """Paths such as `trainer/head.py` in the pages, and docs/NAME.md in the code."""
    cited = [
        (page, name)
        for page in TEXTS
        for name in re.findall(r"`((?:\w+/)+[\w-]+\.(?:py|md|json|yaml|lock))`", page.read_text())
        if name.split("/")[0] in {path.name for path in ROOT.iterdir()}
    ]
    cited += [(path, name) for path in SOURCES for name in re.findall(r"docs/[\w-]+\.md", path.read_text())]
    assert len(cited) > 50
    for path, name in cited:
        assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} cites {name}"


def test_the_arrows_of_the_architecture_page():
    """Its table of rooms is MAY_IMPORT of the architecture test."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| .+ \| (.*) ?\|$", text, re.MULTILINE)
    assert {name: set(re.findall(r"`([\w.]+)`", arrows)) for name, arrows in rows} == MAY_IMPORT


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    """Each message in its tables, cut at "...", is in the sources, except the system's own."""
    text = "\n".join(path.read_text() for path in SOURCES)
    text = re.sub(r'"\s*\n\s*f?"', "", text)  # a message in several literals
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 30
    for message in messages:
        if message != os.strerror(errno.ENOSPC):
            assert all(piece in text for piece in message.split("...")), message
