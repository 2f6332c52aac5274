"""Find what a model quotes in the passage that it was shown, as exact character offsets.

Models change what they quote: letter case, white space, the kind of quotation marks and dashes, a full stop at the end,
or a letter or two. So a quote is looked for as it stands, then in a normal form, then in the normal form without white
space, then stripped of the punctuation around it, and last by edit similarity. A normal form keeps, for each of its
characters, the place that it came from, so that offsets are those of the passage where normalising changes lengths.

The time is that of a bounded number of searches of the passage for each quote: a quote that is longer than
`MAX_MISQUOTE` is not looked for by edit similarity, the only search that costs more than a look at each character.
"""

import bisect
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

SIMILARITY = 85.0  # per cent: twice the characters that two texts share in order, over the lengths of both
MIN_MISQUOTE = 5  # characters: a change to fewer gives another word
MAX_MISQUOTE = 128
COARSE = 70.0  # per cent, before the borders are moved to those of words
NEAR = 3  # word borders that are tried on each side
TRIES = 4  # places that are alike but for the borders

_MARKS = {
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u0060\u00b4\u2032\u02bc\u2039\u203a\uff07", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-"),
}
_FRAME = frozenset(_MARKS) | frozenset("'\".,;:…「」『』。、")  # what models put around a quote
_ZERO_WIDTH_SPACE = "\u200b"
_JOINERS = frozenset("\u00ad\u200c\u200d\u2060")  # stand inside a word and show nothing
_NO_SPACES = (  # code points of the scripts that do not put spaces between words, in order
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x2FDF),  # radicals of Han
    (0x3005, 0x3007),
    (0x3021, 0x30FF),  # Hiragana, Katakana
    (0x3100, 0x312F),  # Bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF),  # Myanmar
    (0xAA60, 0xAADF),  # Myanmar, Tai Viet
    (0xF900, 0xFAFF),  # Han
    (0xFF66, 0xFF9F),  # Katakana of half width
    (0x1AFF0, 0x1B16F),  # Kana
    (0x20000, 0x3FFFF),  # Han
)
_NO_SPACES_FROM = [first for first, _ in _NO_SPACES]


def locate(passage: str, quotes: list[str]) -> list[tuple[int, int] | None]:
    """Where each quote stands in the passage: half-open offsets in characters of a Python string, or None.

    A place begins and ends at the borders of words, except in scripts that put no spaces between words. Among several
    places, that is the first one at or after the end of the place found before, else the first one. Equal quotes take
    successive places; those of different quotes may overlap. White space around a quote does not count, and a quote of
    nothing else is not found.
    """
    search = _Search(passage)
    found: list[tuple[int, int] | None] = []
    after = 0
    for quote in quotes:
        place = search.find(quote, after)
        found.append(place)
        after = place[1] if place else after
    return found


@dataclass(frozen=True)
class _Form:
    """A form of a text to search in, with what is known of each character.

    starts, ends            offsets of what each character came from
    word_starts, word_ends  in order: the places in the form where a quote may start and end
    cuts                    word_ends once more
    """

    text: str
    starts: list[int]
    ends: list[int]
    word_starts: list[int]
    word_ends: list[int]
    cuts: frozenset[int]


class _Search:
    def __init__(self, passage: str) -> None:
        borders = [word_border(passage, index) for index in range(len(passage) + 1)]
        spaced = _normal(passage)
        tight = [piece for piece in spaced if piece[0] != " "]
        as_it_is = [(character, index, index + 1) for index, character in enumerate(passage)]
        self.exact, self.spaced, self.tight = (_form(pieces, borders) for pieces in (as_it_is, spaced, tight))
        self.taken: dict[str, list[tuple[int, int]]] = {}  # by normal forms of quotes, without what is around them

    def find(self, quote: str, after: int) -> tuple[int, int] | None:
        quote = quote.strip()
        bare = _without_frame(quote)
        taken = self.taken.setdefault(_text(_normal(bare or quote)), [])
        seen = False
        for words in dict.fromkeys((quote, bare)):
            normal = _text(_normal(words))
            forms = ((self.exact, words), (self.spaced, normal), (self.tight, normal.replace(" ", "")))
            for form, needle in forms:
                for place in _places(form, needle, after):
                    seen = True
                    if _free(place, taken):
                        taken.append(place)
                        return place
        if seen:  # in the passage, but not as often as it is quoted
            return None
        for at in dict.fromkeys((bisect.bisect_left(self.spaced.starts, after), 0)):
            misquoted = self._nearest(_text(_normal(bare)), at)
            if misquoted and _free(misquoted, taken):
                taken.append(misquoted)
                return misquoted
        return None

    def _nearest(self, needle: str, at: int) -> tuple[int, int] | None:
        """The place of the words from `at` on that are most like the needle, if they are like enough."""
        if not MIN_MISQUOTE <= len(needle) <= MAX_MISQUOTE:
            return None
        form, rest = self.spaced, self.spaced.text[at:]
        for _ in range(TRIES):
            rough = fuzz.partial_ratio_alignment(needle, rest, score_cutoff=COARSE)
            if rough is None:
                return None
            places = [
                (Levenshtein.distance(needle, words), abs(len(words) - len(needle)), start, stop)
                for start in _near(form.word_starts, rough.dest_start + at)
                for stop in _near(form.word_ends, rough.dest_end + at)
                if at <= start < stop
                and _is_word(form.text[start]) == _is_word(needle[0])
                and _is_word(form.text[stop - 1]) == _is_word(needle[-1])
                and fuzz.ratio(needle, words := form.text[start:stop]) >= SIMILARITY
                and _digits(words) == _digits(needle)  # with other digits it is another number, not a misquote
            ]
            if places:
                _, _, start, stop = min(places)
                return form.starts[start], form.ends[stop - 1]
            rest = rest[: rough.dest_start] + "\0" * (rough.dest_end - rough.dest_start) + rest[rough.dest_end :]
        return None


def word_border(text: str, index: int) -> bool:
    """Whether a word can start or end before the character at `index`: 0 to the length of the text."""
    if index in (0, len(text)):
        return True
    if _is_mark(text[index]):
        return False
    kinds = _kind(text[index - 1]), _kind(text[index])
    return "none" in kinds or "no spaces" in kinds


def _is_mark(character: str) -> bool:
    """Whether it belongs to the character before it."""
    return unicodedata.category(character)[0] == "M" and not _is_selector(character)


def _is_selector(character: str) -> bool:
    return 0xFE00 <= ord(character) <= 0xFE0F


def _is_word(character: str) -> bool:
    return _kind(character) != "none"


@lru_cache(maxsize=1 << 14)
def _kind(character: str) -> Literal["none", "letter", "no spaces"]:
    """Of which kind of words it is a character. Digits make words in all scripts."""
    code = ord(character)
    index = bisect.bisect_right(_NO_SPACES_FROM, code) - 1
    if index >= 0 and code <= _NO_SPACES[index][1] and not character.isdigit():
        return "no spaces"
    is_letter = character.isalnum() or character == "_" or character in _JOINERS or _is_mark(character)
    return "letter" if is_letter else "none"


@lru_cache(maxsize=1 << 14)
def _folded(character: str) -> str:
    """The normal form of one character: no case, no presentation form, marks apart; " " for white space."""
    if character.isspace() or character == _ZERO_WIDTH_SPACE:
        return " "
    if character in _MARKS:
        return _MARKS[character]
    if unicodedata.category(character) == "Cf" or _is_selector(character):
        return ""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(_MARKS.get(part, part) for part in plain)


def _normal(text: str) -> list[tuple[str, int, int]]:
    """The characters of the normal form, each with the offsets that it came from.

    White space is one space, and there is none at the ends. The marks of one letter are in canonical order; if that
    changes their order, each of them came from all of them.
    """
    pieces: list[tuple[str, int, int]] = []
    for index, character in enumerate(text):
        for part in _folded(character):
            if part != " " or (pieces and pieces[-1][0] != " "):
                pieces.append((part, index, index + 1))
    if pieces and pieces[-1][0] == " ":
        pieces.pop()
    begin = 0
    while begin < len(pieces):
        end = begin
        while end < len(pieces) and unicodedata.combining(pieces[end][0]):
            end += 1
        if end - begin > 1:
            ordered = sorted(pieces[begin:end], key=lambda piece: unicodedata.combining(piece[0]))
            if ordered != pieces[begin:end]:
                whole = pieces[begin][1], pieces[end - 1][2]
                pieces[begin:end] = [(part, *whole) for part, _, _ in ordered]
        begin = max(end, begin + 1)
    return pieces


def _text(pieces: list[tuple[str, int, int]]) -> str:
    return "".join(character for character, _, _ in pieces)


def _form(pieces: list[tuple[str, int, int]], borders: list[bool]) -> _Form:
    """`borders`: of the text that the pieces came from. A character that became several cannot be cut."""
    starts, ends = [start for _, start, _ in pieces], [end for _, _, end in pieces]
    word_starts, word_ends = [], []
    for index, (character, start, end) in enumerate(pieces):
        if character != " " and borders[start] and (index == 0 or start >= ends[index - 1]):
            word_starts.append(index)
        if character != " " and borders[end] and (index + 1 == len(pieces) or starts[index + 1] >= end):
            word_ends.append(index + 1)
    return _Form(_text(pieces), starts, ends, word_starts, word_ends, frozenset(word_ends))


def _places(form: _Form, needle: str, after: int) -> Iterator[tuple[int, int]]:
    """The places of the needle at or after the offset `after` of the passage, then those before, without overlaps."""
    if not needle:
        return
    middle = bisect.bisect_left(form.starts, after)
    for at, stop in ((middle, len(form.text)), (0, middle)):
        while (at := form.text.find(needle, at)) >= 0 and at < stop:
            next_word = bisect.bisect_left(form.word_starts, at)
            if next_word == len(form.word_starts):
                break
            end = at + len(needle)
            if form.word_starts[next_word] > at:
                at = form.word_starts[next_word]
            elif end in form.cuts:
                yield form.starts[at], form.ends[end - 1]
                at = end
            else:
                at += 1


def _free(place: tuple[int, int], taken: list[tuple[int, int]]) -> bool:
    return all(place[1] <= start or end <= place[0] for start, end in taken)


def _without_frame(quote: str) -> str:
    begin, end = 0, len(quote)
    while begin < end and (quote[begin].isspace() or quote[begin] in _FRAME):
        begin += 1
    while begin < end and (quote[end - 1].isspace() or quote[end - 1] in _FRAME):
        end -= 1
    return quote[begin:end]


def _near(borders: list[int], index: int) -> list[int]:
    middle = bisect.bisect_left(borders, index)
    return borders[max(0, middle - NEAR) : middle + NEAR]


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())
