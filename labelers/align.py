"""Carry values between units of text: from words to tokens, and from one tokenizer's tokens to another's.

All functions work on half-open character offsets, in flat arrays over all documents of a part.
"""

import numpy as np

from lacy.labelers.tokenize import Tokens

_WHITE_SPACE = np.array(sorted(ord(c) for c in map(chr, range(0x3001)) if c.isspace()), np.uint32)


def token_words(
    tokens: Tokens,
    texts: list[str],
    word_document: np.ndarray,
    word_starts: np.ndarray,
    word_ends: np.ndarray,
    *,
    policy: str = "first",
) -> np.ndarray:
    """The word of each token: (T,) int64 index into the words, -1 for none.

    word_document, word_starts, word_ends: (W,) int, words in order of document and offset.
    policy "first": the word that holds the token's first non-whitespace character.
    policy "last": the word that holds its last non-whitespace character.
    A token of white space alone belongs to no word. Raises ValueError for another policy.
    """
    if policy not in ("first", "last"):
        raise ValueError(f"alignment policy is 'first' or 'last', not {policy!r}")
    lengths = np.array([len(text) for text in texts], np.int64)
    base = np.concatenate([[0], np.cumsum(lengths + 1)])[:-1]  # one character between documents keeps them apart
    characters = np.frombuffer("\n".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    solid = np.append(np.flatnonzero(~np.isin(characters, _WHITE_SPACE)), len(characters))
    starts, ends = tokens.starts + base[tokens.document], tokens.ends + base[tokens.document]
    if policy == "first":
        core = solid[np.searchsorted(solid, starts)]
        empty = core >= ends
    else:
        before = np.searchsorted(solid, ends) - 1
        core = np.where(before >= 0, solid[before], -1)
        empty = core < starts
    if len(word_starts) == 0:
        return np.full(len(starts), -1)
    index = np.searchsorted(word_starts + base[word_document], core, side="right") - 1
    inside = (index >= 0) & (core < (word_ends + base[word_document])[index])
    return np.where(inside & ~empty, index, -1)


def spread_loss(source: Tokens, loss: np.ndarray, target: Tokens) -> np.ndarray:
    """Carry the loss of one tokenizer's tokens to another's tokens of the same documents.

    loss: (S,) float32 nats, NaN where there is none. Returns (T,) float32: each source token's loss is divided over
    the target tokens that it overlaps, in proportion to the characters they share, so the sum over a document is
    conserved. A document's first token has no loss (NaN): its share goes to the second. A target token that overlaps
    no scored source token has none either.
    """
    pairs_source, pairs_target, shared = _overlaps(source, target)
    scored = ~np.isnan(loss[pairs_source])
    pairs_source, pairs_target, shared = pairs_source[scored], pairs_target[scored], shared[scored]
    whole = np.bincount(pairs_source, shared, minlength=len(loss))
    part = loss[pairs_source].astype(np.float64) * shared / whole[pairs_source]
    first = np.zeros(len(target.ids), bool)
    starts, ends = target.offsets[:-1], target.offsets[1:]
    first[starts[ends > starts]] = True
    alone = np.zeros(len(target.ids), bool)
    alone[starts[ends == starts + 1]] = True
    keep = ~alone[pairs_target]
    pairs_target, part = pairs_target[keep] + first[pairs_target[keep]], part[keep]
    total = np.bincount(pairs_target, part, minlength=len(target.ids)).astype(np.float64)
    total[np.bincount(pairs_target, minlength=len(target.ids)) == 0] = np.nan
    return total.astype(np.float32)


def spread_flag(source: Tokens, flag: np.ndarray, target: Tokens) -> np.ndarray:
    """(T,) bool: whether all source tokens that the target token overlaps have the flag; false for first tokens."""
    pairs_source, pairs_target, _ = _overlaps(source, target)
    false = np.bincount(pairs_target, ~flag[pairs_source], minlength=len(target.ids)) > 0
    touched = np.bincount(pairs_target, minlength=len(target.ids)) > 0
    result = touched & ~false
    result[target.offsets[:-1][np.diff(target.offsets) > 0]] = False
    return result


def _overlaps(source: Tokens, target: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of overlapping tokens: source index, target index, shared characters (float64).

    A source token without characters, or whose characters no target token covers, is paired with the nearest target
    token of its document, so that its loss is not dropped.
    """
    lengths = np.zeros(len(source.offsets) - 1, np.int64)
    for tokens in (source, target):
        filled = np.diff(tokens.offsets) > 0
        lengths[filled] = np.maximum(lengths[filled], tokens.ends[tokens.offsets[1:][filled] - 1])
    base = np.concatenate([[0], np.cumsum(lengths + 1)])[:-1]
    s_start, s_end = source.starts + base[source.document], source.ends + base[source.document]
    t_start, t_end = target.starts + base[target.document], target.ends + base[target.document]
    low = np.searchsorted(t_end, s_start, side="right")
    high = np.maximum(np.searchsorted(t_start, s_end, side="left"), low)
    first, last = target.offsets[source.document], target.offsets[source.document + 1] - 1
    nothing = (high == low) & (last >= first)
    low = np.where(nothing, np.clip(low, first, last), low)
    high = np.where(nothing, low + 1, high)
    count = high - low
    pairs_source = np.repeat(np.arange(len(s_start)), count)
    pairs_target = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
    shared = np.minimum(s_end[pairs_source], t_end[pairs_target]) - np.maximum(
        s_start[pairs_source], t_start[pairs_target]
    )
    alone = nothing | (s_start == s_end)  # one pair, no characters to share
    return pairs_source, pairs_target, np.where(alone[pairs_source], 1, shared).astype(np.float64)
