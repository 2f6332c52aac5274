"""Text of a corpus or a model made safe for a terminal or a page: control characters become visible marks."""

from typing import Final

BIDI: Final = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))  # code points
_CONTROL_PICTURES: Final = 0x2400  # U+241B is the picture of U+001B, ESC
_LINE_ENDS: Final = (0x0A, 0x85, 0x2028, 0x2029)
_SURROGATES: Final = range(0xD800, 0xE000)
_MARKS = (
    {code: chr(_CONTROL_PICTURES + code) for code in range(0x20)}
    | dict.fromkeys([*range(0x80, 0xA0), *BIDI, *_SURROGATES], "\N{REPLACEMENT CHARACTER}")
    | {0x7F: "\N{SYMBOL FOR DELETE}"}
)
_ONE_LINE = str.maketrans(_MARKS | dict.fromkeys(_LINE_ENDS, "↵ ") | {0x09: " "})
_LINES = str.maketrans(_MARKS | dict.fromkeys(_LINE_ENDS, "\n") | {0x09: "\t"})


def printable(text: str, *, keep_lines: bool = False) -> str:
    """`text` with a visible mark for each control character and lone surrogate. Joiners and combining marks stay.

    The result is one line; with `keep_lines`, line ends and tabs stay and each character stands for one of `text`.
    """
    return text.translate(_LINES if keep_lines else _ONE_LINE)
