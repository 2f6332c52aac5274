import io
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.cells import cell_len, set_cell_size
from rich.console import Console

from lacy.schemas.codes import DELEGATE, IGNORE, LEARN
from lacy.schemas.errors import DatasetError, UsageError
from lacy.stats.show import LOSSES, loss_steps, render, show
from tests.stats.conftest import document, write

STYLED = re.compile(r"\x1b\[[0-9;]*m")


def printed(function, *args, width=60, terminal=True, no_color=False, **options):
    out = io.StringIO()
    system = "256" if terminal else None
    console = Console(file=out, width=width, force_terminal=terminal, color_system=system, no_color=no_color)
    function(*args, console=console, **options)
    return out.getvalue()


def rendered(*args, **options):
    return printed(render, *args, **options)


def shown(*args, **options):
    return printed(show, *args, **options)


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
    assert re.search(r"geese  corpus.jsonl:0\n10 tokens, \d+.0% factual, 2 delegated \(20.0%\)", plain)
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


# A whole document


def test_a_whole_document_with_its_lines(tmp_path):
    text = "Odra Venn\n\n\tmoss\u2028" + "more words " * 200 + "and 1687."
    write(tmp_path, [document("d", text)], sets={"lacy": facts("1687", "moss")})
    plain = shown(tmp_path, "d", terminal=False)
    marked = text.replace("moss", "⟦moss⟧").replace("1687", "⟦1687⟧").replace("\u2028", "\n")
    assert plain.split("\n\n", 1)[1] == marked.expandtabs() + "\n"
    styled = shown(tmp_path, "d")
    assert "\x1b[1;4;33mmoss\x1b[0m" in styled
    assert flat(STYLED.sub("", styled)).endswith("more words and 1687.")


def test_the_heading_has_the_figures_of_a_count_by_hand(dataset, documents):
    doc = documents[3]
    out = flat(shown(dataset, doc.doc_id, terminal=False, width=200, labels="a 'quoted' set"))
    ignored, losses = (
        doc.labels["a 'quoted' set"].count(IGNORE),
        [nll for nll in doc.signals["ref_nll"] if nll is not None],
    )
    assert ignored and doc.doc_id in out and doc.source in out
    count = len(doc.spans)
    assert f"{count:,} tokens, {sum(doc.signals['factual']) / count:.1%} factual, " in out
    assert f"{ignored} ignored ({ignored / count:.1%}), mean loss {sum(losses) / len(losses):.2f} " in out
    assert "Labels a 'quoted' set: ⟨ignored in training⟩, the rest is learned" in out


@pytest.fixture
def scored(tmp_path):
    doc = document("d", "One 22 bee ow my, 9", spans=[(0, 3), (3, 6), (6, 10), (10, 13), (13, 16), (16, 17), (17, 19)])
    doc.signals["ref_nll"] = [None, 0.5, 1.5, 3.0, 3.5, float("nan"), 40.0]
    return write(tmp_path / "scored", [doc], sets={"lacy": facts("22")})


def test_losses_in_steps(scored):
    out = shown(scored, "d", color="loss", terminal=False)
    assert "One 22 ⟦bee⟧₁ ⟦ow my⟧₂, ⟦9⟧₄" in out
    assert "Loss in nats: below 1, ⟦1 to 2⟧₁, ⟦2 to 4⟧₂, ⟦4 to 8⟧₃, ⟦8 or more⟧₄" in flat(out)
    styled = shown(scored, "d", color="loss", width=200)
    assert "22 \x1b[4mbee\x1b[0m \x1b[38;5;16;48;5;186mow my\x1b[0m, \x1b[1;4;38;5;231;48;5;124m9\x1b[0m" in styled
    assert "⟦bee⟧₁" in shown(scored, "d", color="loss", no_color=True)  # where colours cannot say it
    assert "⟦ow my⟧₂" in rendered(scored, ["d"], color="loss", terminal=False)


def test_each_step_begins_with_its_bound():
    losses = np.array([0, *LOSSES, *(np.nextafter(np.float32(LOSSES), np.float32(0))), np.nan, np.inf], np.float32)
    assert loss_steps(losses).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 4]


def test_a_row_for_each_token(dataset, documents):
    doc = documents[5]
    header, *rows = shown(dataset, doc.doc_id, signals=True, terminal=False).split("\n\n", 1)[1].splitlines()
    names = ["position", "token", "token_id", "a 'quoted' set", "lacy", "factual", "pos", "ent_type"]
    assert re.split(r"  +", header) == [*names, "ref_nll", "student_nll", "judge", "ref_correct"]
    assert len(rows) == len(doc.spans) > 50
    for place, row in enumerate(rows):
        cells = row.split()
        assert cells[0] == str(place) and str(doc.signals["token_ids"][place]) in cells
        assert cells[-1] == ("yes" if doc.signals["ref_correct"][place] else "no")
        for name in ("ref_nll", "student_nll", "judge"):
            value = doc.signals[name][place]
            assert value is None or f"{value:.3f}" in cells
        assert ("delegate" in cells) == (doc.labels["lacy"][place] == DELEGATE)
        before = set_cell_size(row, header.index("factual"))
        assert row.startswith(before) and row[len(before) :].split()[0] in ("yes", "no")


def test_a_table_of_one_label_set(dataset, documents):
    header = shown(dataset, documents[0].doc_id, signals=True, labels="lacy", terminal=False)
    assert " lacy " in header and "quoted" not in header


def test_a_dataset_without_optional_columns(bare, documents):
    doc = documents[0]
    with pytest.raises(DatasetError, match="no text to show: it was made with --no-text"):
        shown(bare, doc.doc_id)
    out = shown(bare, doc.doc_id, signals=True, terminal=False)
    assert "No labels: lacy decide makes them" in out and "ref_nll" in out
    assert not {"token", "student_nll", "judge", "ref_correct"} & set(re.split(r"\s\s+", out))


def test_without_losses(tmp_path):
    doc = document("d", "Nobody scored this.")
    doc.signals["ref_nll"] = [None] * len(doc.spans)
    write(tmp_path, [doc], sets={})
    out = shown(tmp_path, "d", terminal=False)
    assert "Nobody scored this." in out and "mean loss" not in out
    with pytest.raises(DatasetError, match="has no losses here"):
        shown(tmp_path, "d", color="loss")


def test_an_id_that_is_not_there(tmp_path):
    write(tmp_path, [document(name, "A goose.") for name in ("wiki-001", "wiki-002", "Other\x1b[2J", "zz")])
    for asked, says in (
        ("wiki-01", "like it are 'wiki-001', 'wiki-002'; lacy sql"),
        ("other", r"like it are 'Other\\x1b\[2J'"),
        ("nothing", r'no document \'nothing\': lacy sql \S+ "SELECT doc_id FROM documents LIMIT 10" names some'),
        ("", "no document '': lacy sql"),
    ):
        with pytest.raises(DatasetError, match=says):
            shown(tmp_path, asked)
    for function, which in ((show, "zz"), (render, ["zz"])):
        with pytest.raises(UsageError, match="--color hue is unknown: use label or loss"):
            printed(function, tmp_path, which, color="hue")


def test_a_document_whose_offsets_leave_its_text(tmp_path):
    write(tmp_path, [document("d", "A goose.", spans=[(0, 1), (1, 99)])])
    with pytest.raises(DatasetError, match="damaged at document 'd'"):
        shown(tmp_path, "d")


def test_a_hostile_document_steers_no_terminal(tmp_path):
    text = "[red]no[/red] \x1b[31mESC\x1b]0;title\x07 \x00 \x9b2J \u202eback :smile: {x} %s\nend\ttab\r" + "w" * 10_000
    write(
        tmp_path, [document("[bold]id\x1b[2J", text, spans=[(0, 20), (20, len(text))])], sets={"[i]\x1b": facts("ESC")}
    )
    for signals in (False, True):
        plain = STYLED.sub("", shown(tmp_path, "[bold]id\x1b[2J", signals=signals, width=200))
        assert "[red]no[/red] ␛[31" in plain and "[bold]id␛[2J" in plain and "[i]␛" in plain
        assert not {"\x1b", "\x00", "\x07", "\x9b", "\u202e", "\r"} & set(plain)


# The command


def command(*arguments, pager=None, rows=20, **options):
    program = "import sys; from lacy.cli import app; app(sys.argv[1:])"
    environment = os.environ | {"TERM": "xterm-256color", "LINES": str(rows), "COLUMNS": "60"}
    environment = {name: value for name, value in environment.items() if name not in ("LESS", "PAGER", "NO_COLOR")}
    return subprocess.run(
        [sys.executable, "-c", program, "show", *map(str, arguments)],
        env=environment | ({"PAGER": pager} if pager else {}),
        timeout=60,
        **options,
    )


def on_a_terminal(*arguments, **options):
    """What the terminal gets."""
    ours, theirs = pty.openpty()
    done = command(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, **options)
    os.close(theirs)
    out = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:
            break
        if not more:
            break
        out += more
    os.close(ours)
    return done.returncode, out.decode()


def test_a_pager_where_it_is_longer_than_the_screen(tmp_path):
    write(tmp_path / "d", [document("d", "Some 37 geese.\n" * 60)], sets={"lacy": facts("37")})
    pager = f"cat > {tmp_path / 'paged'}; echo LESS=$LESS"
    code, out = on_a_terminal(tmp_path / "d", "d", pager=pager)
    assert (code, out) == (0, "LESS=-R\r\n")
    paged = (tmp_path / "paged").read_text()
    assert paged.count("Some \x1b[1;4;33m37\x1b[0m geese.") == 60
    code, out = on_a_terminal(tmp_path / "d", "d", pager=pager, rows=100)
    assert code == 0 and "LESS" not in out and out.count("geese.") == 60


def test_no_pager_in_a_pipe(tmp_path):
    write(tmp_path / "d", [document("d", "Some 37 geese.\n" * 60)], sets={"lacy": facts("37")})
    done = command(tmp_path / "d", "d", pager="false", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("Some ⟦37⟧ geese.\n") == 60 and not done.stderr
    done = command(tmp_path / "d", "e", capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert "no document 'e'" in done.stderr
    done = command(tmp_path / "d", "--signals", capture_output=True, text=True)
    assert done.returncode == 2 and "--signals needs a document" in done.stderr
    done = command(tmp_path / "d", capture_output=True, text=True)
    assert "Some ⟦37⟧ geese.↵" in done.stdout
