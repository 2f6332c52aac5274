import unicodedata

import pytest

from lacy.schemas.printable import BIDI, printable

LETTERS = "é e\u0301 👩\u200d🔬 \u05d0 \xa0"
EVERY = "".join(map(chr, [*range(0x300), *range(0x600, 0x620), *range(0x2000, 0x2070), 0xD800, 0xDFFF, 0x1F9A2]))


def controls(text):
    return {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")} | (
        {chr(code) for code in BIDI} & set(text)
    )


def test_one_line_without_controls():
    shown = printable(EVERY)
    assert not controls(shown) and len(shown.splitlines()) == 1
    assert {"\N{SYMBOL FOR ESCAPE}", "\N{SYMBOL FOR DELETE}", "\N{SYMBOL FOR NULL}"} <= set(shown)
    assert printable("a\nb\tc\x85d\u2028e\r") == "a↵ b c↵ d↵ e␍"


def test_lines_and_tabs_can_stay():
    shown = printable(EVERY, keep_lines=True)
    assert controls(shown) == {"\n", "\t"} and len(shown) == len(EVERY)
    assert printable("a\nb\tc\x85d\u2028e\r", keep_lines=True) == "a\nb\tc\nd\ne␍"


@pytest.mark.parametrize("keep_lines", [False, True])
def test_letters_stay_and_what_has_no_letter_is_marked(keep_lines):
    assert printable(LETTERS, keep_lines=keep_lines) == LETTERS
    assert printable("\x1b[2J\x9b\u202e\ud800\udc80", keep_lines=keep_lines) == "␛[2J����"
