"""The figures as a reader sees them."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from stats import tables
from stats.compute import compute
from stats.tables import show
from tests.stats.conftest import document, write


def printed(stats, **options):
    out = io.StringIO()
    show(stats, Console(**({"file": out, "width": 100} | options)))
    return out.getvalue()


def test_tables_fit(dataset):
    out = printed(compute(dataset))
    lines = out.splitlines()
    assert len(lines) <= 70
    assert max(map(cell_len, lines[1:])) <= 100
    assert "…" not in "".join(line for line in lines if not line.startswith(("very", "A word")))
    assert printed(compute(dataset), width=80) == out, "a file has room"
    narrow = printed(compute(dataset), width=80, force_terminal=True, color_system=None)
    assert max(map(cell_len, narrow.splitlines()[1:])) <= 80
    assert len(narrow.splitlines()) > len(lines)


def test_long_documents_fit(tmp_path):
    out = printed(compute(write(tmp_path, [document(name, "some words " * 3000) for name in "ab"])))
    assert "budget  picked  lowest loss  mean loss  parts of speech" in out
    position = out[out.index("By position") :].split("\n\n")[0]
    assert "1,024-4,095" in position and "delegated loss" in position and "…" not in position


def test_numbers_stand_under_each_other(dataset):
    lines = printed(compute(dataset, "lacy")).splitlines()
    (start,) = (place for place, line in enumerate(lines) if line.startswith("tokens "))
    heads, factual, other = lines[start : start + 3]
    assert len(heads) == len(factual) == len(other) and factual.startswith("factual") and other.startswith("other")


def test_words_are_data(tmp_path):
    text = "[bold]x[/bold] \x1b[31mred\x1b[0m {0} %s \u202eback"
    docs = [document(str(number), text) for number in range(30)]
    out = printed(compute(write(tmp_path, docs)), force_terminal=True, color_system=None)
    assert "bold]x[/bold" in out and "␛[31mred␛[0m" in out
    assert "\x1b" not in out and "\u202e" not in out


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0"), (99_999, "99,999"), (100_000, "100K"), (999_400, "999K"), (1_234_567, "1.23M")),
        *((12_345_678, "12.3M"), (3_000_000_000, "3.00B")),
    ],
)
def test_counts(number, text):
    assert tables._count(number) == text
