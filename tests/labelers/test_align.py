"""From words to tokens, and from one tokenizer's tokens to another's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacy.labelers.align import spread_flag, spread_loss, token_words
from lacy.labelers.tokenize import Tokens


def cut(*documents: list[int]) -> Tokens:
    """Tokens from lists of cut points: [0, 2, 5] is a token over characters 0-2 and one over 2-5."""
    counts = [max(0, len(points) - 1) for points in documents]
    return Tokens(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=np.zeros(sum(counts), np.int32),
        starts=np.array([start for points in documents for start in points[:-1]], np.int32),
        ends=np.array([end for points in documents for end in points[1:]], np.int32),
    )


def words(*spans):
    columns = np.array(spans, np.int32).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def test_the_word_of_a_token_holds_its_first_solid_character():
    #       0123456789
    text = "ab  cd, e"
    tokens = cut([0, 1, 3, 6, 7, 8, 9])  # "a" "b " " cd" "," " " "e"
    found = token_words(tokens, [text], *words((0, 0, 2), (0, 4, 6), (0, 6, 7), (0, 8, 9)))
    assert found.tolist() == [0, 0, 1, 2, -1, 3]


def test_a_token_over_two_words():
    tokens = cut([0, 5])
    spans = words((0, 0, 2), (0, 3, 5))
    assert token_words(tokens, ["ab cd"], *spans, policy="first").tolist() == [0]
    assert token_words(tokens, ["ab cd"], *spans, policy="last").tolist() == [1]
    with pytest.raises(ValueError, match="first"):
        token_words(tokens, ["ab cd"], *spans, policy="middle")


def test_documents_do_not_run_into_each_other():
    tokens = cut([0, 2], [], [0, 1, 3])
    found = token_words(tokens, ["ab", "", " cd"], *words((0, 0, 2), (2, 1, 3)))
    assert found.tolist() == [0, -1, 1]
    last = token_words(tokens, ["ab", "", " cd"], *words((0, 0, 2), (2, 1, 3)), policy="last")
    assert last.tolist() == [0, -1, 1]


def test_white_space_is_pythons():
    tokens = cut([0, 1, 2])
    assert token_words(tokens, ["\u00a0\u2003"], *words((0, 0, 1))).tolist() == [-1, -1]
    assert token_words(tokens, ["\x85\u200b"], *words((0, 0, 2))).tolist() == [-1, 0]


def test_equal_cuts_carry_the_loss_as_it_is():
    tokens = cut([0, 2, 3, 7], [0, 1])
    loss = np.array([np.nan, 1.5, 2.5, np.nan], np.float32)
    np.testing.assert_array_equal(spread_loss(tokens, loss, tokens), loss)


def test_loss_is_divided_by_characters():
    source, target = cut([0, 2, 8]), cut([0, 2, 4, 8])
    loss = spread_loss(source, np.array([np.nan, 3.0], np.float32), target)
    np.testing.assert_allclose(loss, [np.nan, 1.0, 2.0])


def test_what_falls_on_the_first_token_goes_to_the_second():
    source, target = cut([0, 1, 3, 4]), cut([0, 2, 4])
    loss = spread_loss(source, np.array([np.nan, 2.0, 5.0], np.float32), target)
    np.testing.assert_allclose(loss, [np.nan, 7.0])
    assert np.isnan(spread_loss(source, np.array([np.nan, 2.0, 5.0], np.float32), cut([0, 4]))).all()


def test_tokens_that_share_a_character():
    """Two byte tokens of one character against one token of it."""
    shared = Tokens(
        np.array([0, 3]), np.zeros(3, np.int32), np.array([0, 1, 1], np.int32), np.array([1, 2, 2], np.int32)
    )
    whole = cut([0, 1, 2])
    np.testing.assert_allclose(spread_loss(shared, np.array([np.nan, 1, 2], np.float32), whole), [np.nan, 3])
    np.testing.assert_allclose(spread_loss(whole, np.array([np.nan, 3], np.float32), shared), [np.nan, 1.5, 1.5])


def test_flags_are_true_where_all_overlapped_are():
    source, target = cut([0, 1, 3, 5, 6]), cut([0, 1, 4, 5, 6])
    flags = spread_flag(source, np.array([True, True, False, True]), target)
    assert flags.tolist() == [False, False, False, True]


cuts = st.lists(st.integers(1, 40), max_size=12, unique=True).map(sorted)


@given(st.lists(st.tuples(cuts, cuts), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_the_total_of_a_document_is_conserved(documents, random):
    source = cut(*[[0, *inner, 41] for inner, _ in documents])
    target = cut(*[[0, *inner, 41] for _, inner in documents])
    loss = np.array([random.uniform(0, 20) for _ in source.ids], np.float32)
    loss[source.offsets[:-1]] = np.nan
    spread = spread_loss(source, loss, target)
    assert np.isnan(spread[target.offsets[:-1]]).all()
    for document, (_, inner) in enumerate(documents):
        if not inner:
            continue  # one token alone has no score
        before = np.nansum(loss[slice(*source.offsets[document : document + 2])], dtype=np.float64)
        after = np.nansum(spread[slice(*target.offsets[document : document + 2])], dtype=np.float64)
        assert after == pytest.approx(before, rel=1e-5, abs=1e-5)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), max_size=10).map(sorted), cuts)
def test_empty_and_uncovered_source_tokens_lose_nothing(spans, inner):
    starts = np.array([0] + [start for start, _ in spans], np.int32)
    ends = np.maximum.accumulate(np.array([1] + [start + length for start, length in spans], np.int32))
    source = Tokens(np.array([0, len(starts)]), np.zeros(len(starts), np.int32), starts, ends)
    loss = np.linspace(1, 2, len(starts)).astype(np.float32)
    loss[0] = np.nan
    spread = spread_loss(source, loss, cut([0, *inner, 41]))
    if inner:
        assert np.nansum(spread) == pytest.approx(np.nansum(loss), rel=1e-5)
