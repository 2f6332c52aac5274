import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from schemas.codes import DELEGATE, IGNORE, LEARN
from schemas.manifest import DatasetError
from stats.printable import printable
from stats.show import render
from tests.stats.conftest import document, write

STYLED = re.compile(r"\x1b\[[0-9;]*m")


def rendered(dataset, *args, width=60, terminal=True, **options):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    render(dataset, *args, console=console, **options)
    return out.getvalue()


def facts(*words):
    """A policy: the tokens that touch one of these words."""

    def decide(doc, place):
        start, end = doc.spans[place]
        places = [(m.start(), m.end()) for word in words for m in re.finditer(re.escape(word), doc.text)]
        return DELEGATE if any(start < stop and begin < end for begin, stop in places) else LEARN

    return decide


def flat(text):
    return " ".join(text.split())


@pytest.fixture
def small(tmp_path):
    docs = [document("plain", "Nothing to see."), document("geese", "Some 37 geese crossed the Oder in May.")]
    return write(tmp_path, docs, sets={"lacy": facts("37", "Oder"), "masked": lambda *_: IGNORE})


def test_delegated_tokens_are_bold_underlined_and_coloured(small):
    out = rendered(small, ["geese"])
    assert "Some \x1b[1;4;33m37\x1b[0m geese crossed the \x1b[1;4;33mOder\x1b[0m in May." in out
    plain = STYLED.sub("", out)
    assert "geese  10 tokens, 2 delegated" in plain
    assert "Labels lacy: delegated to the larger model, the rest is learned" in flat(plain)


def test_in_a_file_they_stand_in_brackets(small):
    out = rendered(small, ["geese"], terminal=False)
    assert "Some ⟦37⟧ geese crossed the ⟦Oder⟧ in May." in out and "\x1b" not in out
    assert "⟨" not in rendered(small, 2, terminal=False)
    masked = rendered(small, 2, labels="masked", terminal=False)
    assert "⟨Nothing to see.⟩" in masked and "⟨ignored in training⟩" in masked and "delegated" not in masked


def test_documents_with_marks_come_first(small):
    one, two = rendered(small, 1, terminal=False), rendered(small, 2, terminal=False)
    assert "Oder" in one and "Nothing" not in one
    assert two.index("Oder") < two.index("Nothing")


def test_documents_of_later_parts(tmp_path):
    docs = [document(str(n), f"Number {n}.") for n in range(10)]
    write(tmp_path, docs, sets={"lacy": facts("8", "9")}, per_part=2)
    out = rendered(tmp_path, 2, terminal=False)
    assert "⟦8." in out and "⟦9." in out and "Number 0" not in out


def test_an_excerpt_begins_near_the_first_mark(tmp_path):
    text = "word " * 500 + "then 1687 came. " + "more " * 500
    write(tmp_path, [document("long", text)], sets={"lacy": facts("1687")})
    out = rendered(tmp_path, 1, characters=200, terminal=False, width=1000)
    (excerpt,) = (line for line in out.splitlines() if "1687" in line)
    assert excerpt.startswith("…word word") and "then ⟦1687⟧ came." in excerpt and excerpt.endswith("more…")
    assert len(excerpt) <= 204


def test_an_excerpt_begins_with_the_document_when_it_can(small):
    out = rendered(small, ["geese"], characters=20, terminal=False)
    assert "\nSome ⟦37⟧ geese…\n" in out
    assert "…Some" not in out


def test_lines_are_wrapped(tmp_path):
    write(tmp_path, [document("wide", "漢字 🦆🦆 e\u0301te\u0301 geese " * 40)], sets={"lacy": facts("🦆")})
    for width in (20, 47):
        plain = STYLED.sub("", rendered(tmp_path, 1, width=width))
        assert max(map(cell_len, plain.splitlines())) <= width


def test_a_character_of_two_tokens_is_shown_once(tmp_path):
    doc = document("d", "a 🦆 b")
    assert len(set(doc.spans)) < len(doc.spans)
    write(tmp_path, [doc], sets={"lacy": lambda _, place: DELEGATE if place == 2 else LEARN})
    assert "a ⟦🦆⟧ b" in rendered(tmp_path, 1, terminal=False)


def test_text_is_data(tmp_path):
    text = "[red]no[/red] \x1b[31mESC\x1b]0;title\x07 \x00 \x9b2J \u202eback :smile: {x} %s\nend\ttab"
    write(tmp_path, [document("[bold]id\x1b[2J", text)], sets={"[i]set\x1b": facts("ESC")})
    out = rendered(tmp_path, 1, labels="[i]set\x1b", width=200)
    plain = STYLED.sub("", out)
    assert "[red]no[/red] ␛[31m" in plain and ":smile: {x} %s↵ end tab" in plain
    assert "[bold]id␛[2J" in plain and "Labels [i]set␛" in plain
    assert not {"\x1b", "\x00", "\x07", "\x9b", "\u202e"} & set(plain)


def test_what_cannot_be_shown(small, bare, tmp_path):
    for arguments, says in (
        ((small, ["nobody"]), "no document 'nobody'"),
        ((bare, 1), "has no labels: lacy decide"),
        ((tmp_path / "nowhere", 1), "manifest.json"),
    ):
        with pytest.raises(DatasetError, match=says):
            rendered(*arguments)
    with pytest.raises(DatasetError, match="no label set 'rho': it has lacy, masked"):
        rendered(small, 1, labels="rho")
    without = write(tmp_path / "without", [document("a", "One goose.")], without=["text"])
    with pytest.raises(DatasetError, match="no text to show"):
        rendered(without, 1)


def test_a_dataset_without_documents(empty):
    assert "the rest is learned" in rendered(write(empty / "labelled", [], sets={"lacy": facts()}), 3)


def test_printable_is_one_line_without_controls():
    every = "".join(map(chr, range(0x100)))
    shown = printable(every)
    assert shown.isprintable() or all(letter.isprintable() or letter in "\xa0\xad" for letter in shown)
    assert "\N{SYMBOL FOR ESCAPE}" in shown and "\N{SYMBOL FOR DELETE}" in shown
    assert printable("é e\u0301 👩\u200d🔬 \u05d0") == "é e\u0301 👩\u200d🔬 \u05d0"
