"""Quotes of a model, found in the passage: a table of what models do to quotes, and what holds for any text."""
# ruff: noqa: RUF001

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lacy.labelers.quotes import MAX_MISQUOTE, locate, word_border

# Passage, quotes, and for each quote the text of its place, or the text and which of its occurrences, or None.
Expected = str | tuple[str, int] | None
CASES: list[tuple[str, str, list[str], list[Expected]]] = [
    # exact
    ("a name", "Mira Oldan was born in Teverin.", ["Mira Oldan"], ["Mira Oldan"]),
    ("the whole passage", "Mira Oldan", ["Mira Oldan"], ["Mira Oldan"]),
    ("at the end", "She died in Teverin", ["Teverin"], ["Teverin"]),
    ("with its full stop", "She died in Teverin.", ["Teverin."], ["Teverin."]),
    ("a number", "It is 412 metres long.", ["412"], ["412"]),
    ("a number in brackets", "Mira Oldan (1902) wrote.", ["1902"], ["1902"]),
    ("before a possessive", "Oldan's bridge stands.", ["Oldan"], ["Oldan"]),
    ("between hyphens", "the Oldan-Werrel line", ["Werrel"], ["Werrel"]),
    ("with punctuation inside", "born May 3, 1902, there", ["May 3, 1902"], ["May 3, 1902"]),
    ("nested", "in Teverin, Ostland, they met", ["Teverin, Ostland", "Ostland"], ["Teverin, Ostland", "Ostland"]),
    ("out of order", "Oldan met Werrel", ["Werrel", "Oldan"], ["Werrel", "Oldan"]),
    ("a sign", "it costs 5 € a day", ["€"], ["€"]),
    ("white space around the quote", "Mira Oldan was born", ["  Oldan\n"], ["Oldan"]),
    # whole words only
    ("digits of a year", "in 1987", ["19"], [None]),
    ("a year before a number", "in 1987 there were 19 of them", ["19"], [("19", 1)]),
    ("the end of a word", "the unhappy end", ["happy"], [None]),
    ("a word before a longer one", "Oldans and Oldan", ["Oldan"], [("Oldan", 1)]),
    ("joined by an underscore", "the file old_name", ["name"], [None]),
    ("before a mark", "the re\u0301sume\u0301", ["re", "resume"], [None, "re\u0301sume\u0301"]),
    ("a soft hyphen inside", "the Sarn\u00adbridge", ["bridge", "Sarnbridge"], [None, "Sarn\u00adbridge"]),
    # case
    ("lower case", "Mira Oldan was born", ["mira oldan"], ["Mira Oldan"]),
    ("upper case", "Mira Oldan was born", ["MIRA OLDAN"], ["Mira Oldan"]),
    ("as it stands before changed case", "OLDAN met Oldan", ["Oldan"], ["Oldan"]),
    ("sharp s", "in der Hauptstraße 7", ["HAUPTSTRASSE"], ["Hauptstraße"]),
    ("after sharp s", "die große Brücke", ["BRÜCKE"], ["Brücke"]),
    ("half a sharp s", "das Maß gilt", ["mas"], [None]),
    ("dotted capital I", "the town of İzmat, 1902", ["i\u0307zmat", "1902"], ["İzmat", "1902"]),
    ("final sigma", "ο Οδυσσεύς εκεί", ["ΟΔΥΣΣΕΎΣ"], ["Οδυσσεύς"]),
    # white space
    ("a line break", "Mira\nOldan was born", ["Mira Oldan"], ["Mira\nOldan"]),
    ("doubled spaces", "Mira  Oldan was born", ["Mira Oldan"], ["Mira  Oldan"]),
    ("doubled spaces in the quote", "Mira Oldan was born", ["Mira   Oldan"], ["Mira Oldan"]),
    ("a no-break space", "412\u00a0metres long", ["412 metres"], ["412\u00a0metres"]),
    ("a thin space", "412\u2009000 people", ["412 000"], ["412\u2009000"]),
    ("a zero width space", "Mira\u200bOldan was", ["Mira Oldan"], ["Mira\u200bOldan"]),
    ("a missing space in the quote", "Mira Oldan was born", ["MiraOldan"], ["Mira Oldan"]),
    ("a missing space in the passage", "by MiraOldan in", ["Mira Oldan"], ["MiraOldan"]),
    ("spaces around a dash", "Oldan (1902 – 1977)", ["1902–1977"], ["1902 – 1977"]),
    ("words before their run together", "the rapist met the therapist", ["Therapist"], ["therapist"]),
    # punctuation
    ("a curly apostrophe", "the women’s league", ["women's league"], ["women’s league"]),
    ("a straight apostrophe", "the women's league", ["women’s league"], ["women's league"]),
    ("curly quotation marks", "the “Sarn Song” of", ['"Sarn Song"'], ["“Sarn Song”"]),
    ("an en dash", "from 1902–1977 on", ["1902-1977"], ["1902–1977"]),
    ("a minus sign", "at −40 degrees", ["-40"], ["−40"]),
    ("an ellipsis", "the Song… of", ["Song..."], ["Song…"]),
    ("quotation marks of the model", "Mira Oldan was born", ['"Mira Oldan"'], ["Mira Oldan"]),
    ("curly marks of the model", "Mira Oldan was born", ["‘Mira Oldan’"], ["Mira Oldan"]),
    ("a full stop of the model", "Mira Oldan was born", ["Mira Oldan."], ["Mira Oldan"]),
    ("a full stop inside marks", "Mira Oldan was born", ['"Oldan."'], ["Oldan"]),
    ("an ellipsis of the model", "Mira Oldan was born", ["Mira Oldan..."], ["Mira Oldan"]),
    # other Unicode
    ("after an emoji", "👩‍🚀 Mira Oldan 🌉 1902", ["Mira Oldan", "1902"], ["Mira Oldan", "1902"]),
    ("an emoji", "the sign 🌉 stands", ["🌉"], ["🌉"]),
    ("an emoji with a selector", "the sign ❤\ufe0f stands", ["❤"], ["❤"]),
    ("composed for decomposed", "in Cafe\u0301 Sarn", ["Café"], ["Cafe\u0301"]),
    ("decomposed for composed", "in Café Sarn", ["Cafe\u0301 Sarn"], ["Café Sarn"]),
    ("marks in another order", "in Ta\u0301\u0323n today", ["Ta\u0323\u0301n"], ["Ta\u0301\u0323n"]),
    ("a ligature", "the ﬁrst oﬃce", ["first", "office"], ["ﬁrst", "oﬃce"]),
    ("half a ligature", "an oﬀ day", ["of"], [None]),
    ("wide letters", "Ｓａｒｎ １９０２ built", ["Sarn", "1902"], ["Ｓａｒｎ", "１９０２"]),
    ("Han", "田中は東京で生まれた。", ["東京", "田中"], ["東京", "田中"]),
    ("digits beside Han", "1987年に生まれた19人", ["1987", "19"], ["1987", ("19", 1)]),
    ("Thai", "เขาเกิดที่กรุงเทพเมื่อปี2502", ["กรุงเทพ", "2502"], ["กรุงเทพ", "2502"]),
    ("Thai digits", "ปี๒๕๐๒", ["๒๕", "๒๕๐๒"], [None, "๒๕๐๒"]),
    ("Cyrillic", "Мира Олдан родилась", ["мира олдан"], ["Мира Олдан"]),
    ("another plane", "the rune 𐌀𐌁 and 𝐎𝐥𝐝𝐚𝐧 here", ["𐌀𐌁", "Oldan"], ["𐌀𐌁", "𝐎𝐥𝐝𝐚𝐧"]),
    # misquotes
    ("a letter too many", "by Jost Werrel in 1931", ["Jost Werrell"], ["Jost Werrel"]),
    ("a letter too few", "by Jost Werrel in 1931", ["Jost Werel"], ["Jost Werrel"]),
    ("another letter", "by Jost Werrel in 1931", ["Jozt Werrel"], ["Jost Werrel"]),
    ("letters exchanged", "by Michael Sarn in", ["Micheal Sarn"], ["Michael Sarn"]),
    ("no accent", "by José Marín-Sarn in", ["Jose Marin-Sarn"], ["José Marín-Sarn"]),
    ("a word left out", "the University of the Upper Sarn Valley", ["University of Upper Sarn Valley"],
     ["University of the Upper Sarn Valley"]),
    ("part of a word", "they are Ostlanders now", ["Ostlander"], ["Ostlanders"]),
    ("a misquote that is the passage", "Jost Werrel", ["Jost Werrell"], ["Jost Werrel"]),
    ("Han, another character", "彼は国立中央図書館で働いた", ["国立中央図書舘"], ["国立中央図書館"]),
    ("the nearest", "Jost Warrol and Jost Werrel", ["Jost Werrell"], ["Jost Werrel"]),
    ("a misquote in brackets", "(by Jost Werrel)", ["Jost Werrell"], ["Jost Werrel"]),
    ("too short to misquote", "by Anna in 1931", ["Anne"], [None]),
    ("too different", "by Jost Werrel in 1931", ["Joss Warrol"], [None]),
    ("another number", "built in the year 1931", ["the year 1932"], [None]),
    ("a number written apart", "some 1234567 people", ["1,234,567"], ["1234567"]),
    # repeats
    ("twice", "Sarn, then Sarn", ["Sarn", "Sarn"], [("Sarn", 0), ("Sarn", 1)]),
    ("once too often", "Sarn, then Sarn", ["Sarn"] * 3, [("Sarn", 0), ("Sarn", 1), None]),
    ("after another", "Sarn, Oldan, Sarn", ["Oldan", "Sarn"], ["Oldan", ("Sarn", 1)]),
    ("after another, then before", "Sarn, Oldan, Sarn", ["Oldan", "Sarn", "Sarn"],
     ["Oldan", ("Sarn", 1), ("Sarn", 0)]),
    ("only before", "Sarn, Oldan", ["Oldan", "Sarn"], ["Oldan", "Sarn"]),
    ("in another case", "Sarn and SARN", ["Sarn", "sarn"], ["Sarn", "SARN"]),
    ("with a full stop and without", "at Sarn. Sarn is", ["Sarn.", "Sarn"], ["Sarn.", ("Sarn", 1)]),
    ("a misquote twice", "Jost Werrel, then Jost Werrel", ["Jost Werrell"] * 3,
     [("Jost Werrel", 0), ("Jost Werrel", 1), None]),
    ("not found between", "Sarn, then Sarn", ["Sarn", "Teverin", "Sarn"], [("Sarn", 0), None, ("Sarn", 1)]),
    ("overlapping itself", "ba ba ba ba", ["ba ba", "ba ba", "ba ba"], [("ba ba", 0), ("ba ba", 2), None]),
    # not there
    ("another text", "Mira Oldan was born", ["Jost Werrel"], [None]),
    ("of two words, one", "Mira was born", ["Mira Oldan"], [None]),
    ("empty", "Mira Oldan", ["", "  ", "\u200b", "“”"], [None, None, None, None]),
    ("in an empty passage", "", ["Oldan", ""], [None, None]),
    ("longer than the passage", "Oldan", ["Mira Oldan was born in Teverin"], [None]),
    ("an escape", "Mira Oldan", ["\\w+", "(.*)"], [None, None]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("passage", "quotes", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_quotes_are_found(passage: str, quotes: list[str], expected: list[Expected]) -> None:
    assert locate(passage, quotes) == [place_of(passage, words) for words in expected]


def place_of(passage: str, expected: Expected) -> tuple[int, int] | None:
    if expected is None:
        return None
    words, occurrence = (expected, 0) if isinstance(expected, str) else expected
    places = [index for index in range(len(passage)) if passage.startswith(words, index)]
    return places[occurrence], places[occurrence] + len(words)


def test_the_table_is_large() -> None:
    assert len(CASES) >= 60
    assert len({case[0] for case in CASES}) == len(CASES)


ALPHABET = "abAB19 \n.,'\"-’–ßﬁİéσς\u0301\u0323\u00a0\u00ad\u200b\u200d\ufe0f東京กี่🌉𝐎\U00020000ﷺ…½"
TEXT = st.text(ALPHABET, max_size=40) | st.text(max_size=30)


@given(TEXT, st.data())
@example("ba", None)
def test_an_exact_quote_of_whole_words_is_found(passage: str, data: st.DataObject | None) -> None:
    borders = [index for index in range(len(passage) + 1) if word_border(passage, index)]
    start, end = (0, len(passage)) if data is None else sorted(data.draw(st.sampled_from(borders)) for _ in "ab")
    quote = passage[start:end].strip()
    head = start + len(passage[start:end]) - len(passage[start:end].lstrip())
    if not quote or not word_border(passage, head) or not word_border(passage, head + len(quote)):
        return
    (place,) = locate(passage, [quote])
    assert place is not None
    assert passage[slice(*place)] == quote


@given(TEXT, st.lists(TEXT | st.text("ab19 .", max_size=8), max_size=6))
def test_places_are_ranges_of_whole_words(passage: str, quotes: list[str]) -> None:
    places = locate(passage, quotes)
    assert len(places) == len(quotes)
    for place in places:
        if place is not None:
            start, end = place
            assert 0 <= start < end <= len(passage)
            assert word_border(passage, start)
            assert word_border(passage, end)
            assert passage[start:end].strip() == passage[start:end]
    equal: dict[str, list[tuple[int, int]]] = {}
    for quote, place in zip(quotes, places, strict=True):
        if place is not None:
            equal.setdefault(quote, []).append(place)
    for same in equal.values():
        assert all(a[1] <= b[0] for a, b in zip(sorted(same), sorted(same)[1:], strict=False))


@given(st.text("aé東ß \u0301", min_size=1, max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_what_stands_around_does_not_move_a_place(quote: str, before: str, after: str) -> None:
    lead, trail = before + " (", ") " + after
    if not quote.strip() or quote.strip()[0] == "\u0301" or quote.strip() in before:
        return
    place = locate(lead + quote + trail, [quote])[0]
    assert place is not None
    assert (lead + quote + trail)[slice(*place)] == quote.strip()


@pytest.mark.parametrize(
    ("passage", "quotes"),
    [
        ("a" * 10_000, ["a" * length for length in range(1, 101)]),
        ("ab " * 3_333, ["a" * (index % 3 + 1) + "." * index for index in range(100)]),
        ("a ab " * 2_000, ["ab a" * 28 + "x" * (index % 16) + "." * index for index in range(100)]),
        ("東" * 10_000, ["東" * 50 + "京" * index for index in range(100)]),
        ("e\u0301\u0323" * 3_333, ["e\u0323\u0301" * index for index in range(100)]),
        ("\u0323\u0301" * 5_000, ["\u0301"] * 100),
        ("Sarn " * 2_000, ["Sarn"] * 100),
        (" ".join(f"word{index}" for index in range(1_200)), [f"wurd{index * 7}s" for index in range(100)]),
    ],
    ids=["one word", "short words", "near misses", "Han", "marks", "marks alone", "repeats", "misquotes"],
)
def test_time_is_bounded(passage: str, quotes: list[str]) -> None:
    began = time.perf_counter()
    locate(passage, quotes)
    assert time.perf_counter() - began < 10  # seconds; ordinary text takes a hundredth, the worst of these one or two


def test_only_short_quotes_are_searched_for_misquotes() -> None:
    words = " ".join(f"w{index}" for index in range(100))
    assert len(words) > MAX_MISQUOTE
    assert locate(f"{words} end", [words]) == [(0, len(words))]
    assert locate(f"{words} end", [words.replace("w0", "ww0")]) == [None]
