"""Find a model's quotes in the passage that it was shown, as exact character offsets.

Models change what they quote: letter case, white space, the kind of quotation marks and dashes, a full stop at the end,
or a letter or two. A quote is therefore searched for as it stands, then in a normal form, then in the normal form
without white space, then without the punctuation around it, and finally by edit similarity. A normal form remembers
which character of the passage each of its characters came from, so offsets are exact where normalizing changes lengths.

Each quote costs a bounded number of searches of the passage. Only the search by edit similarity costs more than a look
at each character, and quotes longer than `MAX_MISQUOTE` skip it.
"""

import bisect
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

Span = tuple[int, int]  # half-open character offsets

SIMILARITY = 85.0  # percent: twice the characters that two texts share in order, over the lengths of both
MIN_MISQUOTE = 5  # characters; a change to a shorter text makes it another word
MAX_MISQUOTE = 128  # characters
COARSE = 70.0  # percent, before a match is extended to word borders
NEAR = 3  # word borders tried on each side of a match
TRIES = 4  # coarse matches tried

_MARKS = {
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u0060\u00b4\u2032\u02bc\u2039\u203a\uff07", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-"),
}
_FRAME = frozenset(_MARKS) | frozenset("'\".,;:…「」『』。、")  # what models put around a quote
_ZERO_WIDTH_SPACE = "\u200b"
_JOINERS = frozenset("\u00ad\u200c\u200d\u2060")  # stand inside a word and show nothing
_NO_SPACES = (  # how the names of characters begin in scripts that put no spaces between words
    *("BOPOMOFO", "CJK", "HALFWIDTH KATAKANA", "HANGZHOU", "HENTAIGANA", "HIRAGANA", "IDEOGRAPHIC", "KANGXI"),
    *("KATAKANA", "KHMER", "LAO", "MYANMAR", "NEW TAI LUE", "TAI LE", "TAI THAM", "TAI VIET", "THAI", "TIBETAN"),
    *("VERTICAL IDEOGRAPHIC", "VERTICAL KANA"),
)


def locate(passage: str, quotes: list[str]) -> list[Span | None]:
    """The span of each quote in the passage: half-open character offsets, or None where it is not in the passage.

    A span begins and ends at word borders, except in scripts that put no spaces between words. Of several occurrences
    the first at or after the end of the previous quote's span is taken, else the first of all. Equal quotes take
    successive occurrences; spans of different quotes may overlap. White space around a quote does not count, and a
    quote of white space alone has no span.
    """
    search = _Search(passage)
    spans: list[Span | None] = []
    after = 0
    for quote in quotes:
        span = search.find(quote, after)
        spans.append(span)
        after = span[1] if span else after
    return spans


@dataclass(frozen=True)
class _Form:
    """A searchable form of a text.

    starts, ends            for each character, the offsets in the text of what it came from
    word_starts, word_ends  ascending indices of the form at which a quote may start and end
    cuts                    word_ends as a set
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
        self.taken: dict[str, list[Span]] = {}  # by the quote's normal form without punctuation around it

    def find(self, quote: str, after: int) -> Span | None:
        quote = quote.strip()
        bare = _without_frame(quote)
        taken = self.taken.setdefault(_text(_normal(bare or quote)), [])
        seen = False
        for words in dict.fromkeys((quote, bare)):
            normal = _text(_normal(words))
            forms = ((self.exact, words), (self.spaced, normal), (self.tight, normal.replace(" ", "")))
            for form, needle in forms:
                for span in _occurrences(form, needle, after):
                    seen = True
                    if _free(span, taken):
                        taken.append(span)
                        return span
        if seen:  # in the passage, but quoted more often than it occurs
            return None
        for first in dict.fromkeys((bisect.bisect_left(self.spaced.starts, after), 0)):
            misquoted = self._nearest(_text(_normal(bare)), first)
            if misquoted and _free(misquoted, taken):
                taken.append(misquoted)
                return misquoted
        return None

    def _nearest(self, needle: str, first: int) -> Span | None:
        """The span of the words most similar to the needle, from index `first` on; None if none are similar enough."""
        if not MIN_MISQUOTE <= len(needle) <= MAX_MISQUOTE:
            return None
        form, rest = self.spaced, self.spaced.text[first:]
        for _ in range(TRIES):
            rough = fuzz.partial_ratio_alignment(needle, rest, score_cutoff=COARSE)
            if rough is None:
                return None
            candidates = [
                (Levenshtein.distance(needle, words), abs(len(words) - len(needle)), start, stop)
                for start in _near(form.word_starts, rough.dest_start + first)
                for stop in _near(form.word_ends, rough.dest_end + first)
                if first <= start < stop
                and _is_word(form.text[start]) == _is_word(needle[0])
                and _is_word(form.text[stop - 1]) == _is_word(needle[-1])
                and fuzz.ratio(needle, words := form.text[start:stop]) >= SIMILARITY
                and _digits(words) == _digits(needle)  # with other digits it is another number, not a misquote
            ]
            if candidates:
                _, _, start, stop = min(candidates)
                return form.starts[start], form.ends[stop - 1]
            rest = rest[: rough.dest_start] + "\0" * (rough.dest_end - rough.dest_start) + rest[rough.dest_end :]
        return None


def word_border(text: str, index: int) -> bool:
    """Whether a word can start or end before the character at `index`, 0 to the length of the text."""
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
    """The kind of words that a character belongs to. Digits make words in all scripts."""
    is_letter = character.isalnum() or character == "_" or character in _JOINERS or _is_mark(character)
    if is_letter and not character.isdigit() and unicodedata.name(character, "").startswith(_NO_SPACES):
        return "no spaces"
    return "letter" if is_letter else "none"


@lru_cache(maxsize=1 << 14)
def _folded(character: str) -> str:
    """The normal form of one character: without case or presentation form, decomposed; " " for white space."""
    if character.isspace() or character == _ZERO_WIDTH_SPACE:
        return " "
    if character in _MARKS:
        return _MARKS[character]
    if unicodedata.category(character) == "Cf" or _is_selector(character):
        return ""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(_MARKS.get(part, part) for part in plain)


def _normal(text: str) -> list[tuple[str, int, int]]:
    """The characters of the normal form, each with the offsets of what it came from.

    Runs of white space become one space, and none at the ends. The marks of a letter are put in canonical order; where
    that reorders them, each of them gets the offsets of all.
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
    """`borders`: `word_border` at each offset of the text. A character that became several cannot be cut."""
    starts, ends = [start for _, start, _ in pieces], [end for _, _, end in pieces]
    word_starts, word_ends = [], []
    for index, (character, start, end) in enumerate(pieces):
        if character != " " and borders[start] and (index == 0 or start >= ends[index - 1]):
            word_starts.append(index)
        if character != " " and borders[end] and (index + 1 == len(pieces) or starts[index + 1] >= end):
            word_ends.append(index + 1)
    return _Form(_text(pieces), starts, ends, word_starts, word_ends, frozenset(word_ends))


def _occurrences(form: _Form, needle: str, after: int) -> Iterator[Span]:
    """The spans of the needle at or after the offset `after` of the passage, then those before, without overlaps."""
    if not needle:
        return
    middle = bisect.bisect_left(form.starts, after)
    for begin, stop in ((middle, len(form.text)), (0, middle)):
        while (begin := form.text.find(needle, begin)) >= 0 and begin < stop:
            next_word = bisect.bisect_left(form.word_starts, begin)
            if next_word == len(form.word_starts):
                break
            end = begin + len(needle)
            if form.word_starts[next_word] > begin:
                begin = form.word_starts[next_word]
            elif end in form.cuts:
                yield form.starts[begin], form.ends[end - 1]
                begin = end
            else:
                begin += 1


def _free(span: Span, taken: list[Span]) -> bool:
    return all(span[1] <= start or end <= span[0] for start, end in taken)


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
