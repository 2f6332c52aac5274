import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacy.labelers.llm.windows import slices, windows


def test_the_docstring_example() -> None:
    assert windows(10, 5, 2) == [(0, 5, 1), (3, 8, 5), (6, 10, 8)]


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_nothing_to_score(n_tokens: int) -> None:
    assert windows(n_tokens, 5, 2) == []


@pytest.mark.parametrize("n_tokens", [2, 4, 5])
def test_a_document_that_fits_is_one_window(n_tokens: int) -> None:
    assert windows(n_tokens, 5, 4) == [(0, n_tokens, 1)]


@pytest.mark.parametrize(("size", "overlap"), [(5, 5), (5, 6), (5, 0), (5, -1), (1, 0), (0, 0)])
def test_overlap_must_fit(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        windows(0, size, overlap)


@given(st.data())
def test_each_token_but_the_first_is_scored_once_with_context(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 40))
    overlap = data.draw(st.integers(1, size - 1))
    n_tokens = data.draw(st.integers(0, 200))
    plan = windows(n_tokens, size, overlap)

    scored = [token for _, end, score_from in plan for token in range(score_from, end)]
    assert scored == list(range(1, n_tokens))
    for index, (begin, end, score_from) in enumerate(plan):
        assert 0 <= begin < score_from < end <= n_tokens
        assert end - begin <= size
        assert end - begin == size or index == len(plan) - 1
        assert score_from - begin == (overlap if index else 1)


def test_slices_are_bounded_and_keep_order():
    assert list(slices([5, 5, 1, 12, 3], 10)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(slices([], 10)) == []
