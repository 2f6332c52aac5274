import io
import json
import math
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from rich.console import Console

from lacy.cascade import show
from lacy.cascade.generate import Generation, Piece, Token
from lacy.schemas.printable import printable

STYLED = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = (
    "[red]no[/red] \x1b[31mESC\x1b]0;title\x07 \x00 \x9b2J \u202eback\r<script>alert('x')</script> {{ 7 * 7 }} & %s"
)


def token(text, by="slm", *, missed=False, score=None, **more):
    called = by != "slm" or missed
    return Token(id=7, text=text, by=by, called=called, missed=missed, margin=score, score=score, **more)


def generation(*tokens, index=0, prompt="Odra Venn was born in", finish="length", **more):
    calls = sum(token.called for token in tokens)
    missed = sum(token.missed for token in tokens)
    given = {
        "text": "".join(token.text for token in tokens),
        "positions": len(tokens),
        "calls": calls,
        "missed": missed,
        "partner_tokens": calls - missed,
        "seconds": 3.14159,
        "partner_seconds": 1.2,
    }
    return Generation(index=index, prompt=prompt, tokens=list(tokens), finish=finish, **given | more)


@pytest.fixture
def written():
    return generation(
        token(" Lum", "partner", score=2.0),
        token("eria", "slm", score=-1.0),
        token(" in", "slm", score=-3.0),
        token(" 1945", "both", score=1.0),
        token(" the", "slm", missed=True, score=1.5),
        token(".\n\tEnd", "slm"),
        failure="http://127.0.0.1:9: no\nroute",
    )


def console(terminal=True, width=200):
    return Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="standard" if terminal else None
    )


def shown(generations, terminal=True, **options):
    out, errors = console(terminal, **options), console(False)
    show.text(generations, out, errors)
    return out.file.getvalue(), errors.file.getvalue()


# Text


def test_authors_are_coloured_on_a_terminal(written):
    out, errors = shown([written])
    assert "\x1b[2mOdra Venn was born in\x1b[0m\x1b[1;36m Lum\x1b[0meria in\x1b[3;35m 1945\x1b[0m" in out
    assert " \x1b[4;33mthe\x1b[0m." in out
    plain = STYLED.sub("", out)
    cost = "6 positions; 3 calls (50.0%); 2 partner tokens; 1 missed (http://127.0.0.1:9: no route); 3.1 s, 1.2 of them"
    assert cost in plain and "as long as was asked for" in plain
    assert plain.endswith(
        "the partner's, the small model's and the partner's, the small model's, where the partner did not answer\n"
    )
    assert not errors


def test_the_legend_has_what_is_there():
    out, _ = shown([generation(token(" alone"))])
    assert "partner's" not in out and "missed" not in out
    out, _ = shown([generation(token(" x", "partner"))])
    assert "the partner's" in out and "did not answer" not in out


def test_elsewhere_there_is_the_text_alone(written):
    out, errors = shown([written, generation(token(" b" * 300), index=4)], terminal=False, width=40)
    assert out == ("Odra Venn was born in Lumeria in 1945 the.\n\tEnd\n\nOdra Venn was born in" + " b" * 300 + "\n")
    first, second = errors.splitlines()
    assert first.startswith("text 0: 6 positions; 3 calls") and second.startswith("text 4: 1 position; 0 calls (0.0%);")


def test_a_text_without_positions():
    out, _ = shown([generation(finish="context", text="")])
    assert "0 positions; 0 calls (-)" in out and "the model's context is full" in out


def test_generated_text_steers_no_terminal():
    hostile = generation(token(HOSTILE, "partner"), prompt=HOSTILE, failure=HOSTILE, missed=1)
    for terminal in (True, False):
        for out in shown([hostile], terminal=terminal):
            plain = STYLED.sub("", out)
            assert not {"\x1b", "\x00", "\x07", "\x9b", "\u202e", "\r"} & set(plain)
            if plain:
                assert "[red]no[/red] ␛[31mESC␛]0;title␇ ␀ �2J �back␍" in plain


# A stream


def streamed(pieces, terminal=True):
    out, errors = console(terminal), console(False)
    stream = show.Stream(out, errors, "Odra\tVenn")
    for piece in pieces:
        stream(piece)
    stream.end(generation(*(token(piece.text, piece.by) for piece in pieces)))
    return out.file.getvalue(), errors.file.getvalue()


PIECES = [
    Piece(0, " was ", "slm"),
    Piece(0, "born\n", "partner"),
    Piece(0, "\tin ", "slm", missed=True),
    Piece(0, "\x1b[31m[b]", "slm"),
]


def test_pieces_come_as_they_are_with_their_colours():
    out, errors = streamed(PIECES)
    assert out.startswith("\x1b[2mOdra    Venn\x1b[0m was \x1b[1;36mborn")
    assert "\x1b[4;33m        in \x1b[0m␛[31m[b]\n" in out
    assert STYLED.sub("", out).startswith("Odra    Venn was born\n        in ␛[31m[b]\n4 positions; 1 call")
    assert not errors


def test_pieces_in_a_file():
    out, errors = streamed(PIECES, terminal=False)
    assert out == "Odra\tVenn was born\n\tin ␛[31m[b]\n"
    assert errors.startswith("4 positions")


def test_each_piece_is_there_at_once():
    class Watched(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    for terminal in (True, False):
        file = Watched()
        out = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=20)
        stream = show.Stream(out, out, "Odra")
        for number, piece in enumerate([Piece(0, " a" * 30, "slm"), Piece(0, " b", "partner"), Piece(0, " c", "slm")]):
            stream(piece)
            assert STYLED.sub("", file.flushed) == "Odra" + " a" * 30 + "".join([" b", " c"][:number])


# JSONL


def lines(generations):
    file = io.StringIO()
    show.write_jsonl(generations, file)
    return file.getvalue().splitlines()


def test_lines_are_generations_in_order(written):
    three = [written.model_copy(update={"index": index}) for index in (2, 0, 1)]
    out = lines(three)
    assert [json.loads(line)["index"] for line in out] == [0, 1, 2]
    assert [Generation.model_validate_json(line) for line in out] == sorted(three, key=lambda each: each.index)
    first = json.loads(out[0])
    assert first["tokens"][0] == {
        "id": 7, "text": " Lum", "by": "partner", "margin": 2.0, "uncertainty": None, "score": 2.0, "called": True,
        "missed": False,
    }  # fmt: skip
    assert (first["calls"], first["missed"], first["partner_tokens"], first["finish"]) == (3, 1, 2, "length")


def test_a_line_is_written_when_those_before_it_are(written):
    file = io.StringIO()
    counts = []

    def ending():
        for index in (1, 2, 0, 3):
            yield written.model_copy(update={"index": index})
            counts.append(file.getvalue().count("\n"))

    show.write_jsonl(ending(), file)
    assert counts == [0, 0, 3, 4]


def test_what_has_ended_is_written_when_the_rest_fails(written):
    def failing():
        for index in (3, 1):
            yield written.model_copy(update={"index": index})
        raise RuntimeError("out of memory")

    file = io.StringIO()
    with pytest.raises(RuntimeError):
        show.write_jsonl(failing(), file)
    assert [json.loads(line)["index"] for line in file.getvalue().splitlines()] == [1, 3]


def test_numbers_that_are_not_finite_are_null():
    (line,) = lines([generation(token("x", score=math.inf, uncertainty=math.nan))])
    (only,) = json.loads(line, parse_constant=lambda name: pytest.fail(name))["tokens"]
    assert only["score"] is only["margin"] is only["uncertainty"] is None


def test_jsonl_holds_the_text_as_it_is():
    text = HOSTILE + "\u2028\x7f\n é 🦆"
    (line,) = lines([generation(token(text), prompt=text)])
    found = json.loads(line)
    assert found["text"] == found["prompt"] == found["tokens"][0]["text"] == text
    assert "é 🦆" in line
    assert not [letter for letter in line if unicodedata.category(letter) in ("Cc", "Zl") or letter == "\u202e"]


# HTML


class Page(HTMLParser):
    """Tags with their attributes, and the text and spans of each section."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.spans, self.cells = [], [], [], []
        self._stack = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "br"):
            self._stack.append((tag, attributes))
        if tag == "p" and attributes.get("class") == "text":
            self.texts.append("")
            self.spans.append([])
        elif tag == "span" and any(name == "p" for name, _ in self._stack):
            self.spans[-1].append([attributes, ""])
        elif tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self._stack.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "p" and attributes["class"] == "text" for tag, attributes in self._stack):
            self.texts[-1] += data
            self.spans[-1][-1][1] += data
        elif any(tag in ("td", "th") for tag, _ in self._stack):
            self.cells[-1] += data


def test_a_page_has_each_token_with_its_author_and_scores(written):
    page = Page(show.html([written], "Two texts"))
    assert page.texts == [written.prompt + written.text]
    prompt, *spans = page.spans[0]
    assert prompt == [{"class": "prompt"}, written.prompt]
    assert [(attributes["class"], text) for attributes, text in spans] == [
        ("partner", " Lum"), ("slm", "eria"), ("slm", " in"), ("both", " 1945"), ("missed", " the"),
        ("slm", ".\n\tEnd"),
    ]  # fmt: skip
    titles = [attributes["title"] for attributes, _ in spans]
    assert titles[0] == "token 7, partner, called, margin 2, score 2"
    assert titles[4] == "token 7, small model, failed call, margin 1.5, score 1.5"
    assert titles[5] == "token 7, small model"
    assert [attributes.get("style") for attributes, _ in spans] == [
        None, "--rank: 0.25", "--rank: 0.00", None, None, None,
    ]  # fmt: skip


def test_a_page_has_the_costs_and_their_totals(written):
    other = generation(token(" x"), token(" y"), index=1, prompt="Later", finish="end")
    page = Page(show.html([other, written], "Costs"))
    rows = [page.cells[start : start + 9] for start in range(0, len(page.cells), 9)]
    assert rows[1] == ["0", "Odra Venn was born in", "6", "3", "50.0%", "2", "1", "3.1", "1.2"]
    assert rows[2] == ["1", "Later", "2", "0", "0.0%", "0", "0", "3.1", "1.2"]
    assert rows[3] == ["all", "", "8", "3", "37.5%", "2", "1", "", ""]
    assert page.texts == [text.prompt + text.text for text in (written, other)]


def test_a_page_of_hostile_text():
    hostile = generation(token(HOSTILE, "partner"), prompt=HOSTILE, failure=HOSTILE, missed=1)
    source = show.html([hostile], HOSTILE)
    page = Page(source)
    assert page.texts == [printable(HOSTILE, keep_lines=True) * 2]
    assert "<script" not in source and "{{ 7 * 7 }}" in source
    assert not {"\x1b", "\x00", "\x07", "\x9b", "\u202e", "\r"} & set(source)


def test_a_page_needs_nothing_else(written):
    source = show.html([written], "Alone")
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "src")]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert links == [f"#{name}" for name in ids] == ["#text-0"]
    assert "url(" not in source and "@import" not in source
    assert show.html([written], "Alone") == source


def test_a_page_without_texts():
    assert Page(show.html([], "None")).cells[9:] == ["all", "", "0", "0", "-", "0", "0", "", ""]


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2's ratio of two colours, (r, g, b) from 0 to 1."""
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(written, scheme):
    block = re.findall(r":root \{(.*?)\}", show.html([written], "Colours"), re.DOTALL)[scheme]
    named = dict(re.findall(r"--([\w-]+): #(\w{6});", block))
    colours = {name: tuple(int(value[at : at + 2], 16) / 255 for at in (0, 2, 4)) for name, value in named.items()}
    heat = [int(value) / 255 for value in re.search(r"--heat: (\d+), (\d+), (\d+);", block).groups()]
    hot = tuple(0.25 * warm + 0.75 * cold for warm, cold in zip(heat, colours["page"], strict=True))
    pairs = [(colours["ink"], colours["page"]), (colours["quiet"], colours["page"]), (colours["ink"], hot)]
    pairs += [(colours[name], colours[f"{name}-back"]) for name in ("partner", "both", "missed")]
    for ink, back in pairs:
        assert contrast(ink, back) >= 4.5
