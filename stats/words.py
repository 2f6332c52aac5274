"""Words and their losses, from text and token offsets, without a loop over tokens.

Words are those of the views (`lacy.schemas.views`): runs of at most 64 non-whitespace characters. A token belongs to
the word of its first non-whitespace character. A batch of documents is one long array of characters, in which words are
found and the word of each token is looked up.

This is NumPy because it is fast: on one core it counts 4.9M tokens/s from text to sums, while finding the bounds of
words alone takes as long with `re` (5.2M tokens/s, and it holds the interpreter's lock) and more than half as long with
DuckDB's regexp_extract_all (8.4M, without offsets). Arrow's split is faster, but gives no offsets.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lacy.schemas.codes import LEARN

LONGEST: Final = 64  # characters
SUMS: Final = ("occurrences", "chosen", "scored", "nll", "kept_scored", "kept_nll")
_MERGE_ROWS = 2_000_000
_SPACES = [*range(0x09, 0x0E), *range(0x1C, 0x20), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029]
_SPACES += [0x20, 0x202F, 0x205F, 0x3000]
_IS_SPACE = np.zeros(0x3002, np.bool_)  # the last stands for all characters beyond it
_IS_SPACE[_SPACES] = True

Array = npt.NDArray[Any]
_NONE = pa.table({"word": pa.array([], pa.string())} | {name: pa.array([], pa.float64()) for name in SUMS})


def count_words(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Count each word without the punctuation around it: a table of `word` and SUMS over its occurrences, unordered.

    The loss of an occurrence is the sum over its tokens. `batches` have one row for each document:
    text, token_starts, token_ends, ref_nll, label (lists of one length), and `places`, the indices from 1 of the tokens
    to count, or null for all.
    """
    merged = _NONE
    waiting: list[pa.Table] = []
    for table in _in_threads(_count, batches):
        waiting.append(table)
        if sum(table.num_rows for table in waiting) > max(_MERGE_ROWS, merged.num_rows):
            merged, waiting = _merge([merged, *waiting]), []
    spelled = _merge([merged, *waiting])
    bare = pc.replace_substring_regex(spelled["word"], r"^\p{P}+|\p{P}+$", "")
    words = _merge([spelled.set_column(0, "word", bare)])
    return words.filter(pc.not_equal(words["word"], ""))


def _in_threads(work: Callable[[pa.RecordBatch], pa.Table], batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Map on all cores, with few batches in memory. NumPy and Arrow release the interpreter's lock."""
    threads = os.cpu_count() or 1
    running: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            running.append(pool.submit(work, batch))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _merge(tables: list[pa.Table]) -> pa.Table:
    merged = pa.concat_tables(tables).group_by("word").aggregate([(name, "sum") for name in SUMS])
    return merged.rename_columns(["word", *SUMS])


def _count(batch: pa.RecordBatch) -> pa.Table:
    """Count the words of a batch as they are spelled, with punctuation."""
    text = batch["text"].cast(pa.large_string())
    utf8 = _utf8(text)
    lengths = pc.utf8_length(text).to_numpy()
    characters = (
        utf8
        if len(utf8) == lengths.sum()
        else np.frombuffer("".join(text.to_pylist()).encode("utf-32-le", "surrogatepass"), np.uint32)
    )
    document = np.concatenate(([0], np.cumsum(lengths)))  # where each begins in `characters`
    starts, ends = _words(characters, document)
    word, token = _words_of_tokens(batch, document, starts, ends)
    if not len(word):
        return _NONE
    first = np.flatnonzero(np.diff(word, prepend=-1))  # tokens of one word stand together
    losses = batch["ref_nll"].flatten()
    has_loss = losses.is_valid().to_numpy(zero_copy_only=False)
    label = batch["label"].flatten().to_numpy(zero_copy_only=False)
    scored = np.logical_or.reduceat(has_loss[token], first)
    chosen = np.logical_or.reduceat(label[token] != LEARN, first)
    nll = np.add.reduceat(losses.fill_null(0).to_numpy()[token], first, dtype=np.float64)
    spelled = _spelling(utf8, characters, starts[word[first]], ends[word[first]]).dictionary_encode()
    index, size = spelled.indices.to_numpy(), len(spelled.dictionary)

    def total(weights: Array) -> Array:
        return np.bincount(index, weights, size)

    kept = ~chosen
    sums = (
        total(np.ones(len(index))),
        total(chosen),
        total(scored),
        total(nll),
        total(scored & kept),
        total(nll * kept),
    )
    return pa.table([spelled.dictionary, *sums], names=["word", *SUMS])


def _utf8(text: pa.LargeStringArray) -> Array:
    """The bytes of all texts, concatenated."""
    _, offsets, data = text.buffers()
    bounds = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1]
    return np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]] if data else np.zeros(0, np.uint8)


def _words(characters: Array, document: Array) -> tuple[Array, Array]:
    """Starts and ends of the words, half-open. No word crosses the end of a document."""
    space = _IS_SPACE[characters if characters.dtype == np.uint8 else np.minimum(characters, len(_IS_SPACE) - 1)]
    border = np.zeros(len(space) + 1, np.bool_)
    border[document] = True
    border[1:] |= space
    border[:-1] |= space
    # A word is the range between two borders that is not a space.
    borders = np.flatnonzero(border)
    starts, ends = borders[:-1], borders[1:]
    words = ~space[starts]
    return starts[words], ends[words]


def _words_of_tokens(batch: pa.RecordBatch, document: Array, starts: Array, ends: Array) -> tuple[Array, Array]:
    """For each token that has a word, in order: the word's index into `starts`, and the token's into the batch."""
    offsets = batch["token_starts"].offsets.to_numpy() - batch["token_starts"].offsets[0].as_py()
    base = np.repeat(document[:-1], np.diff(offsets))
    begin = batch["token_starts"].flatten().to_numpy() + base
    end = batch["token_ends"].flatten().to_numpy() + base
    ended = np.zeros(document[-1] + 1, np.int32)
    ended[ends] = 1
    word = np.cumsum(ended, dtype=np.int32)[begin]  # the first that ends after the token begins
    starts, is_short = np.append(starts, document[-1]), np.append(ends - starts <= LONGEST, False)
    has_word = (starts[word] < end) & (begin < end) & is_short[word]
    if batch["places"].null_count < batch.num_rows:
        counts = pc.fill_null(pc.list_value_length(batch["places"]), 0).to_numpy()
        asked = np.zeros(len(begin), np.bool_)
        asked[batch["places"].flatten().to_numpy() - 1 + np.repeat(offsets[:-1], counts)] = True
        has_word &= asked
    token = np.flatnonzero(has_word)
    return word[token], token


def _spelling(utf8: Array, characters: Array, starts: Array, ends: Array) -> pa.Array:
    """The words as an Arrow string array, cut out of the UTF-8 text."""
    if len(utf8) != len(characters):
        byte = np.append(np.flatnonzero((utf8 & 0xC0) != 0x80), len(utf8))  # where each character begins
        starts, ends = byte[starts], byte[ends]
    # Words and the gaps between them alternate; the gaps are dropped.
    turns = np.empty(2 * len(starts), np.int64)
    turns[::2], turns[1::2] = starts, ends
    both = pa.LargeStringArray.from_buffers(len(turns) - 1, pa.py_buffer(turns), pa.py_buffer(utf8))
    return both.take(np.arange(0, len(both), 2)).cast(pa.string())
