"""Packages import along the arrows of CONTRIBUTING.md, and nothing else of ours."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "schemas": set(),
    "labelers": {"schemas"},
    "pipeline": {"schemas", "labelers"},
    "stats": {"schemas"},
    "trainer": {"schemas"},
    "cascade": {"schemas", "trainer"},
    "lacy": {"schemas", "labelers", "pipeline", "stats", "trainer", "cascade"},
}
FORBIDDEN = {
    "schemas": {"apache_beam", "spacy", "torch", "transformers", "vllm"},
    "labelers": {"apache_beam"},
    "stats": {"apache_beam", "spacy", "torch", "transformers", "vllm"},
    "trainer": {"apache_beam", "spacy"},
}
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


def test_there_is_something_to_check():
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    names = imported(path)
    assert names & MAY_IMPORT.keys() <= MAY_IMPORT[package] | {package}
    assert not names & FORBIDDEN.get(package, set())
    assert "tests" not in names and "benchmarks" not in names


def test_the_command_loads_nothing_heavy():
    """lacy/cli.py is imported for every --help."""
    light = {"os", "sys", "collections", "contextlib", "pathlib", "typing", "typer"}
    for name in ("cli.py", "cascade_cli.py", "running.py"):
        assert imported(ROOT / "lacy" / name, top_level_only=True) <= light | {"lacy"}
    assert imported(ROOT / "lacy" / "__init__.py", top_level_only=True) <= {"importlib", "typing"}


def test_packages_have_no_other_top_level():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders <= MAY_IMPORT.keys() | {"tests", "docker", "benchmarks"}
