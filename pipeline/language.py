"""Warn about a corpus that is not English, from a sample of its documents.

The grammar knows English alone; on other languages its verdicts are noise. Between a fifth and a half of the words of
English prose are function words (the, of, and, ...), but few words of another language coincide with them. A document
counts as not English when it reads like prose and has hardly any of these. Code, tables, lists of names and short
texts say nothing about a language, and are passed over.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lacy.pipeline.corpus import spool
from lacy.pipeline.corpus.readers import read
from lacy.pipeline.corpus.sources import Range, Stream

_WORDS = """
    the of and to is for that with by at from it his her their are this these be been were which who whose had not but
    have has its they would could should there where when what how into after before between during through about
    because while than then we you your our my she him them did does can will may some any such other only
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
FEWEST = 0.1  # share of function words below which prose is not English; 0.2 to 0.5 is usual
PROSE_LETTERS, PROSE_WORDS = 200, 40  # of a document, at least; a shorter one is not judged
LETTERS = 0.85  # share of letters among the characters of prose, without white space; code and tables have fewer
CAPITALISED = 0.6  # share of capitalised words above which a text is a list of names
SHARE = 0.05  # of the judged documents: more that are not English give a warning
PIECES, PIECE_BYTES, DOCUMENTS = 8, 1 << 16, 200  # of the sample: ranges, bytes of each, documents of all
_WORD = re.compile(r"[^\W\d_]+")


def language_warning(planned: Sequence[Range | Stream]) -> str:
    """One line that names the share of documents that are not English and the first of them, or "" where few are."""
    judged, others = 0, []
    for doc_id, text in islice(_sample(planned), DOCUMENTS):
        english = is_english(text)
        judged += english is not None
        if english is False:
            others.append(doc_id)
    if not others or len(others) <= SHARE * judged:
        return ""
    return (
        f"{len(others) / judged:.0%} of {judged:,} sampled documents do not look English (the first is {others[0]}): "
        "the grammar works for English only, so their labels will be wrong (use --policy loss)"
    )


def is_english(text: str) -> bool | None:
    """Whether a text looks English; None where it is too short, or no prose."""
    words = _WORD.findall(text)
    letters = sum(map(len, words))
    if letters < PROSE_LETTERS:
        return None
    if sum(letter.lower() != letter.upper() for word in words for letter in word) < letters / 2:
        return False  # Chinese, Arabic, Hindi, ...: a script without capitals
    prose = letters >= LETTERS * sum(map(len, text.split())) and len(words) >= PROSE_WORDS
    if not prose or sum(word[0].isupper() for word in words) > CAPITALISED * len(words):
        return None
    return sum(word.lower() in FUNCTION_WORDS for word in words) >= FEWEST * len(words)


def _sample(planned: Sequence[Range | Stream]) -> Iterator[tuple[str, str]]:
    """Ids and texts of documents at the beginning of parts that are evenly spaced over the corpus."""
    folder = Path(tempfile.mkdtemp(prefix="lacy-"))
    try:
        for item in planned[:: max(1, len(planned) // PIECES)][:PIECES]:
            piece = _beginning(item, folder)
            if piece is not None:
                documents = read(piece)
                yield from islice(zip(documents.ids, documents.texts, strict=True), DOCUMENTS // PIECES)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _beginning(item: Range | Stream, folder: Path) -> Range | None:
    if isinstance(item, Stream):
        return next(iter(spool.cut(item, folder, PIECE_BYTES, set())), None)
    if item.format == "txt":
        return item
    limit = min(DOCUMENTS // PIECES, item.limit or DOCUMENTS)
    return replace(item, end=min(item.end, item.start + PIECE_BYTES), limit=limit)
