"""Wikitext as prose: what a reader would see, on honest pages and on hostile ones."""

# ruff: noqa: RUF001  (dashes and signs are meant here)

import random
import time

import pytest

from lacy.pipeline.corpus.wikitext.articles import MAX_WIKITEXT, Page, clean, parse_page


def body(wikitext: str) -> str:
    text = clean("T", wikitext)
    return text.removeprefix("T").removeprefix("\n\n")


def page(inner: str = "", *, ns: str = "0", model: str = "wikitext", text: str = "Some '''text'''.") -> bytes:
    return (
        f"<page><title>A &amp; B</title><ns>{ns}</ns><id>12</id>{inner}<revision><id>99</id><model>{model}</model>"
        f'<text xml:space="preserve">{text}</text></revision></page>'
    ).encode()


# Pages.


def test_a_page_is_read() -> None:
    assert parse_page(page()) == Page("12", "A & B", "Some '''text'''.")
    assert parse_page(page().replace(b"<model>wikitext</model>", b"")) == Page("12", "A & B", "Some '''text'''.")
    assert parse_page(b"  " + page(text="&lt;ref&gt;x&lt;/ref&gt; é &amp;amp;") + b"\n") == Page(
        "12", "A & B", "<ref>x</ref> é &amp;"
    )


def test_an_empty_page_is_a_title() -> None:
    empty = parse_page(page().replace(b"<text", b"<text/><x").replace(b"</text>", b"</x>"))
    assert empty == Page("12", "A & B", "")
    assert clean("A & B", "") == "A & B"


@pytest.mark.parametrize(
    "xml",
    [
        page('<redirect title="B" />'),
        page(ns="1"),
        page(ns="10"),
        page(model="css"),
        page(text="#REDIRECT [[B]]"),
        page(text="\n#redirect [[B]]"),
    ],
)
def test_what_is_no_article_is_none(xml: bytes) -> None:
    assert parse_page(xml) is None


ENTITY_BOMB = b'<!DOCTYPE page [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        (ENTITY_BOMB + page(), "declarations"),
        (b'<?xml version="1.0" encoding="utf-16"?>' + page(), "declarations"),
        (page().replace(b"Some", b"&a;"), "not well-formed"),
        (page()[:-7], "not well-formed"),
        (page(text="\x01"), "not well-formed"),
        (page().decode().encode("utf-16"), "not UTF-8"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "not well-formed"),
        (b"<a/>", "not <page>"),
        (page().replace(b"<id>12</id>", b""), "numeric <id>"),
        (page().replace(b"<id>12</id>", b"<id>x</id>"), "numeric <id>"),
        (page().replace(b"<title>A &amp; B</title>", b""), "no <title>"),
        (b"<page><title>A</title><ns>0</ns><id>1</id></page>", "no <revision>"),
    ],
)
def test_a_malformed_page_is_refused(xml: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_page(xml)


# Articles.


def test_an_article_reads_like_one() -> None:
    text = clean(
        "Ada\u00a0Rowe",
        "{{Infobox person\n| name = Ada\n| born = {{birth date|1880|2|3}}\n}}\n"
        "[[File:Rowe.jpg|thumb|Ada with [[Tom Rowe|her brother]], {{circa|1900}}]]\n"
        "'''Ada Rowe''' ({{IPAc-en|r|oʊ}}; born 1880) was a [[Painting|painter]].<ref>{{cite book|title=X}}</ref> She\n"
        "lived in [[Ghent]].<ref name=a />\n\n"
        "== Early life ==\nHer [[parent]]s were ''poor''.\n"
        "=== Works ===\n{| class=wikitable\n! Year !! Work\n|-\n| 1900 || [[Sea]]\n|}\n"
        "== Legacy ==\n=== Influence ===\n* a prize, and\n* a street.\n"
        "== References ==\n{{reflist}}\n=== Books ===\nRowe, A.\n"
        "[[Category:Painters]]\n[[fr:Ada Rowe]]\n",
    )
    assert text == (
        "Ada Rowe\n\n"
        "Ada Rowe (born 1880) was a painter. She lived in Ghent.\n"
        "Early life.\nHer parents were poor.\n"
        "Legacy.\nInfluence.\na prize, and\na street."
    )


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        # links
        ("[[a]] [[b|c]]s [[d (e)|]] [[f, g|]] [[Help:h (i)|]] [[:Category:J]]", "a cs d f h Category:J"),
        ("x [[File:a.png|thumb|b [[c|d]] [http://e f] {{g}}]] y", "x y"),
        ("x [[Category:a]] [[fr:a]] [[zh-min-nan:a]] y [[ER (series)]] [[A: B]]", "x y ER (series) A: B"),
        ("[http://a b c] x [http://d] y http://e.org z", "b c x y http://e.org z"),
        ("[//a b] [note] [[a|[b]]]", "b [note] [b]"),
        # quotes
        ("'''a''' ''b'' '''''c''''' L''''amour'''", "a b c L'amour"),
        # templates that carry prose
        ("{{convert|5|km}}, {{convert|5|-|10|km|mi|0}}, {{convert|6|ft|2|in}}, {{cvt|1200|sqmi}}", None),
        (
            "{{lang|fr|mot}} {{transl|ru|da}} {{lang-el|λ}} {{langx|la|lex}} {{Lang-xyz|q}}",
            "mot da Greek: λ Latin: lex q",
        ),
        ("{{nowrap|a b}} {{abbr|c|d}} {{small|{{nowrap|e}}}} {{nowrap|1=f=g}}", "a b c e f=g"),
        ("{{birth date|1990|1|2}} {{start date|1990|01|02|df=yes}} {{start date|1990}}", None),
        ("{{as of|2010|5}} {{as of|2010|lc=y}}", "As of May 2010 as of 2010"),
        ("a{{ndash}}b{{spaced ndash}}c{{nbsp}}d {{'}}s {{!}} {{=}}", "a–b – c d 's | ="),
        ("{{quote|Be it.|Someone}}\nand <blockquote>so\nit</blockquote> was", "Be it.\nand\nso it\nwas"),
        ("{{hlist|a|b}} {{frac|1|2}} {{chem|H|2|O}} {{formatnum:1234567}} {{uc:abc}}", "a, b 1/2 H2O 1,234,567 ABC"),
        ("{{USS|Oak|CV-1}} {{circa|1900}} {{ill|Name|de|N}} {{sic|teh}}", "USS Oak (CV-1) c. 1900 Name teh [sic]"),
        ("{{nihongo|Hill|丘|oka}} {{zh|t=山|p=shan}}", "Hill (丘, oka) traditional Chinese: 山; pinyin: shan"),
        # those that do not, and what they leave
        ("Earl ({{IPA|x}}; born 1751)", "Earl (born 1751)"),
        ("Earl ({{IPA|x}}) of, {{cn}}, {{cn}} x ({{IPA|x}}, {{respell|y}} ; ) y {{cn}}.", "Earl of, x y."),
        ("A (pronounced {{IPA|x}}, or {{IPA|y}}; also B) f() and (x)", "A (also B) f() and (x)"),
        ("x {{#if:a|b}} y{{unknown|{{nowrap|z}}}}", "x y"),
        # tags, comments, entities
        ("a<!-- b --> c<ref>d</ref>, e<ref name='f'/> g<br>h<br/>i", "a c, e g\nh\ni"),
        ("a\n<!-- x -->\nb", "a b"),
        ("<nowiki>[[a]] ''b'' {{c}} <d></nowiki>", "[[a]] ''b'' {{c}} <d>"),
        ("<math>x^2 \\leq \\frac{a}{b}</math> is <math>\\sum_{i=0}^n f(i)</math> ok", "x² ≤ a/b is ok"),
        ("H<sub>2</sub>O 10<sup>-3</sup> m<sup>th</sup> <span style='x'>a</span> <foo> 1 < 2", None),
        ("a&nbsp;b\u00a0\u2009c &amp; &lt;ref&gt; &#8211; d\u200b\x07e", "a b c & <ref> – de"),
        ("<gallery>\nFile:a.jpg|b\n</gallery>x __NOTOC__ y<pre>z</pre>", "x y"),
        ("<poem>\nOne line,\nand ''two''.\n</poem>", "One line,\nand two."),
        # lines
        ("* a\n** b\n# c\n; d : e\n: f\n----\ng", "a\nb\nc\nd : e\nf\ng"),
        ("a\n\n\n\nb\nc\n \nd", "a\nb c\nd"),
        ("{|\n| a\n{|\n| b\n|}\n|}after\n{{nowrap|c}}", "after c"),
        ("a\n*\n* ²\n* --\n{{x}}\nb", "a\nb"),
        ("== A ==\n== B: ==\nx\n== Why? ==\ny\n=== C ===\n== See also ==\nz\n== D ==\nw", "B.\nx\nWhy?\ny\nD.\nw"),
    ],
)
def test_markup(wikitext: str, expected: str | None) -> None:
    cases = {
        "{{convert|5|km}},": "5 km, 5–10 km, 6 ft 2 in, 1,200 sq mi",
        "{{birth date|1990|1|2}}": "January 2, 1990 2 January 1990 1990",
        "H<sub>2</sub>O": "H2O 10⁻³ mth a <foo> 1 < 2",
    }
    assert body(wikitext) == (expected or next(v for k, v in cases.items() if wikitext.startswith(k)))


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("a {{b c\n\nd", "a\nd"),
        ("{{Infobox x\n| a = b\n| c = d\ne", "e"),
        ("a [[b c\n\nd [[e]]", "a b c\nd e"),
        ("[[File:a.jpg|thumb|b [[c]]\nd", "d"),
        ("a }} b ]] c", "a b c"),
        ("{|\n| a\n| b\n\nc", "c"),
        ("a<ref>b\n\nc<ref>d</ref>", "ab\nc"),
        ("a <!-- b", "a"),
        ("a </span> </ref> b ''c", "a b c"),
        ("{{a|[[b}} c ]] d", "c d"),
        ("[[{{a}}|b]] {{c[[d]]|e}} {{{f|g}}}", "b cd|e }"),
        ("== a\nb ==\n==\n=", "== a b == == ="),
        ("=) {{a|=[[b}}\n={{nowrap|c}}", "=) =c"),
    ],
)
def test_broken_markup_loses_little(wikitext: str, expected: str) -> None:
    assert body(wikitext) == expected


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        clean("T", "a" * (MAX_WIKITEXT + 1))


def test_hidden_marks_of_ours_in_a_page_are_removed() -> None:
    noncharacters = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert clean(f"T{noncharacters}", f"a{noncharacters}b &#xFDE1; c\ud800") == "T\n\nab c"


# Time. Each of these took minutes, or hours, where a step was quadratic; all take about a second or less.

PIECES = """
{{ [[ '' ' <ref> <!-- <nowiki> <math> <b> <poem> <pre> <sup>1 < <a {{a| [[a| {{nowrap| {{convert| {{quote|= {{formatnum:
{{uc: {{{ { } }} ]] [http://a [[File: [[File:a| [[a(b)| == = * : ; & &#1 ( () ({{a}}; | || __A _ ;, {{a[[b]]| [[a{{b}}|
{{convert|1|to| {{hlist|a| {{!}} {{'}} {{a}}. [[a]] http://a </ref> <ref/>
"""
LINES = ["{|\n", "|}\n", "{|\n|}\n", "==a\n", "== a ==\n", "\n", "\n*", " ", "{{\n{|\n", "[http://a\n", "{{a|\n=b="]
HOSTILE = [*PIECES.split(), *LINES]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_pages_take_time_in_proportion(piece: str) -> None:
    started = time.perf_counter()
    clean("T", piece * (100_000 // len(piece)))
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize("piece", ["{{", "[[", "''", "<ref>", "{{a|", "[[a|", "{|\n"])
def test_two_megabytes_of_openings(piece: str) -> None:
    started = time.perf_counter()
    clean("T", piece * (2_000_000 // len(piece)))
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize("depth", [10, 40, 5000])
@pytest.mark.parametrize(("opening", "closing"), [("{{nowrap|", "}}"), ("[[a|{{quote|=", "}}]]"), ("{|\n", "|}\n")])
def test_deep_nesting(opening: str, closing: str, depth: int) -> None:
    nest = opening * depth + "x" + closing * depth
    started = time.perf_counter()
    text = clean("T", nest * (50_000 // len(nest) + 1))
    assert time.perf_counter() - started < 30
    assert "{{" not in text
    assert "]]" not in text


def test_any_mixture_is_cleaned() -> None:
    order = random.Random(7)
    pieces = [*HOSTILE, "a", "word ", "\n\n", "</poem>", "-->", "</nowiki>", "'''", "=", "lang|fr|", "Category:"]
    for _ in range(300):
        text = clean("T", "".join(order.choices(pieces, k=order.choice([10, 50, 200]))))
        assert "\n\n\n" not in text
        assert "  " not in text
        assert not any((ord(c) < 32 and c != "\n") or 0xFDD0 <= ord(c) < 0xFDF0 for c in text)
