"""Packages import along the arrows of docs/architecture.md, without circles, and by their names in `lacy` alone."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "schemas": set(),
    "labelers": {"schemas", "labelers.llm"},
    "labelers.llm": {"schemas"},
    "pipeline": {"schemas", "labelers", "labelers.llm", "pipeline.corpus", "pipeline.runners"},
    "pipeline.corpus": {"schemas"},
    "pipeline.runners": {"schemas"},
    "stats": {"schemas"},
    "trainer": {"schemas"},
    "cascade": {"schemas", "trainer", "labelers.llm", "cascade.evaluation"},
    "cascade.evaluation": {"schemas", "trainer", "labelers.llm", "cascade"},
}
ROOMS = sorted(MAY_IMPORT, key=len, reverse=True)  # the innermost first
FOLDERS = {room.partition(".")[0] for room in MAY_IMPORT}
FORBIDDEN = {
    "schemas": {"apache_beam", "spacy", "torch", "transformers", "vllm"},
    "labelers": {"apache_beam"},
    "stats": {"apache_beam", "spacy", "torch", "transformers", "vllm"},
    "trainer": {"apache_beam", "spacy"},
}
MODULES = sorted(path for package in [*FOLDERS, "lacy"] for path in (ROOT / package).rglob("*.py"))
PYTHON = [path for path in ROOT.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def module(path: Path) -> str:
    """`lacy.pipeline.label` for pipeline/label.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("lacy", *parts) if parts[0] != "lacy" else parts).removesuffix(".__init__")


NAMES = {module(path) for path in MODULES}


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """What a file imports, as modules where they are ours, else as the name that stands there."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in NAMES else str(node.module)


def room(name: str) -> str:
    """`pipeline.corpus` for lacy.pipeline.corpus.readers; "" for the command and what is not ours."""
    inner = name.removeprefix("lacy.")
    return next((room for room in ROOMS if f"{inner}.".startswith(f"{room}.")), "")


def test_there_is_something_to_check():
    assert len(MODULES) > 100
    assert all(any(room(name) == known for name in NAMES) for known in MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    here, found = room(module(path)), set(imports(path))
    roots = {name.partition(".")[0] for name in found}
    assert not roots & FORBIDDEN.get(here.partition(".")[0], set())
    assert not roots & {"tests", "benchmarks", "experiments"}
    if here:  # the command itself may import everything
        ours = {name for name in found if name.partition(".")[0] == "lacy"}
        assert all(room(name) for name in ours), "nothing imports the command"
        assert {room(name) for name in ours} <= MAY_IMPORT[here] | {here}


def test_no_circle():
    graph = {module(path): {name for name in imports(path) if name in NAMES} - {module(path)} for path in MODULES}
    TopologicalSorter(graph).prepare()


def test_folders_are_imported_as_parts_of_lacy():
    """`import trainer` would be a user's own trainer.py."""
    for path in PYTHON:
        bare = {name.partition(".")[0] for name in imports(path)} & FOLDERS
        assert not bare, f"{path}: {bare}"


def test_lacy_links_to_each_folder():
    links = {path.name: path.readlink() for path in (ROOT / "lacy").iterdir() if path.is_symlink()}
    assert links == {folder: Path("..", folder) for folder in FOLDERS}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == FOLDERS | {"lacy", "tests"}


def test_the_command_loads_nothing_heavy():
    """lacy/cli.py, and what it imports of ours, is imported for every --help."""
    light = {"dataclasses", "functools", "inspect", "io", "logging", "pydantic", "typer", "types"}
    light |= {"collections", "contextlib", "json", "os", "pathlib", "re", "sys", "time", "typing", "urllib"}
    paths, queue = {module(path): path for path in MODULES}, ["lacy.cli"]
    for name in queue:
        ours = set(imports(paths[name], top_level_only=True)) & paths.keys()
        assert {each.partition(".")[0] for each in imports(paths[name], top_level_only=True)} <= light | {"lacy"}, name
        queue += sorted(ours - set(queue))
    assert len(queue) > 10
    roots = {each.partition(".")[0] for each in imports(paths["lacy"], top_level_only=True)}
    assert roots <= {"importlib", "typing"}
