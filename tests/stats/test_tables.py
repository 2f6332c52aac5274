"""The figures as a reader sees them."""

import io
import re
from collections import Counter

import pytest
from rich.cells import cell_len
from rich.console import Console

from lacy.stats import tables
from lacy.stats.compute import compute
from lacy.stats.tables import show
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


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_figure_is_cut(dataset, width, monkeypatch):
    monkeypatch.setattr(tables, "KINDS", 0)  # lists may be cut, and say so
    stats = compute(dataset, "lacy", by="part")
    wide, narrow = (
        Counter(
            re.findall(r"(?<!\S)\d[\d,.]*%?(?!\S)", printed(stats, width=of, force_terminal=True, color_system=None))
        )
        for of in (300, width)
    )
    assert wide.total() > 200 and narrow == wide


def test_lists_that_are_cut_say_so(dataset):
    out = printed(compute(dataset, "lacy"), width=80, force_terminal=True, color_system=None)
    lines = out[out.index("Choice of policy") :].split("\n\n")[0].splitlines()[3:]
    assert len(lines) == 5 and all(line.rstrip().endswith("…") for line in lines)


def test_the_figures_are_those_of_compute(dataset):
    """In the order of the columns; of two label sets it is told from the side of the one that is looked at."""
    for mine, other in (("lacy", "a 'quoted' set"), ("a 'quoted' set", "lacy")):
        stats = compute(dataset, mine)
        rows = [re.split(r"\s{2,}", line.strip()) for line in printed(stats, width=99).splitlines()]
        share = lambda part, whole: f"{part / whole:.1%}"  # noqa: E731
        for labels in stats.label_sets:
            chosen = labels.delegated + labels.ignored
            shares = [share(labels.delegated, stats.tokens), share(labels.ignored, stats.tokens)]
            assert [labels.name, "lacy", "15.0%", *shares, share(labels.factual, chosen), "6.00"] in rows
        [pair] = stats.agreement
        only = (pair.only_a, pair.only_b) if pair.a == mine else (pair.only_b, pair.only_a)
        shares = [share(count, stats.tokens) for count in (pair.both, *only)]
        expected = [other, share(pair.same, stats.tokens), f"{pair.kappa:.2f}", *shares]
        assert only[0] != only[1] and expected in [row[:6] for row in rows]
        for pick in stats.budgets:
            figures = (share(pick.tokens, stats.tokens), f"{pick.threshold:.2f}", f"{pick.nll / pick.tokens:.2f}")
            assert [f"{pick.budget:.0%}", *figures] in [row[:4] for row in rows]
        for name, losses in (("factual", stats.losses.factual), ("other", stats.losses.other)):
            assert [name, *(f"{loss:.2f}" for loss in losses)] in rows
        verb = "ignored" if mine != "lacy" else "delegated"
        assert any(row[0].startswith(f"Words most often {verb}") for row in rows)


def test_groups_and_words_are_those_of_compute(dataset):
    stats = compute(dataset, "lacy")
    out = printed(stats, width=99, force_terminal=True, color_system=None)  # too narrow for two side by side
    rows = [line.split() for line in out.splitlines()]
    for group in [*stats.pos[:5], *stats.ent_type[:5], *stats.position, *stats.length]:
        shares = (group.tokens / stats.tokens, group.factual / group.tokens, group.delegated / group.tokens)
        mean = "-" if group.mean_nll is None else f"{group.mean_nll:.2f}"
        assert [group.name or "(none)", f"{group.tokens:,}", *(f"{of:.1%}" for of in shares), mean] in rows
    folded = stats.pos[tables.ROWS - 1 :]
    assert any(row[:3] == [f"({len(folded)}", "others)", f"{sum(of.tokens for of in folded):,}"] for row in rows)
    for word in stats.chosen_words[:3]:
        assert [word.word, f"{word.chosen:,}", f"{word.occurrences:,}", f"{word.mean_nll:.2f}"] in rows
    for word in stats.kept_words[:3]:
        assert [word.word, f"{word.occurrences - word.chosen:,}", f"{word.mean_kept_nll:.2f}"] in rows


def test_nothing_to_count_is_one_line(dataset, empty):
    assert printed(compute(dataset, where="position < 0")) == f"{dataset}: no tokens where position < 0\n"
    assert printed(compute(empty)) == f"{empty}: no tokens\n"


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
