"""Corpus text for a terminal: what would move the cursor, change colours or turn the writing around becomes a mark."""

from typing import Final

_LINE_END: Final = "↵ "
_CONTROL_PICTURES: Final = 0x2400  # U+241B is the picture of U+001B, ESC
_BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_MARKS = str.maketrans(
    {code: chr(_CONTROL_PICTURES + code) for code in range(0x20)}
    | dict.fromkeys([*range(0x80, 0xA0), *_BIDI], "\N{REPLACEMENT CHARACTER}")
    | dict.fromkeys([ord("\n"), 0x85, 0x2028, 0x2029], _LINE_END)
    | {ord("\t"): " ", 0x7F: "\N{SYMBOL FOR DELETE}"}
)


def printable(text: str) -> str:
    """`text` in one line, with a visible mark for each control character. Joiners and combining marks stay."""
    return text.translate(_MARKS)
