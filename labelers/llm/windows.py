"""Windows over documents longer than a model's context, such that each token is scored once, with context."""

from collections.abc import Iterator


def windows(n_tokens: int, size: int, overlap: int) -> list[tuple[int, int, int]]:
    """Plan windows of at most `size` tokens over a document of `n_tokens`; each is `(begin, end, score_from)`.

    A window reads the tokens `[begin, end)`, and gives the scores of `[score_from, end)`. These ranges adjoin: every
    token but the first is scored exactly once. In the first window a token has all tokens before it as context; in a
    later one it has at least `overlap` tokens. No window but the last is shorter than `size`.

    Ten tokens, windows of five, overlap two (`.` read as context, `x` scored)::

        windows(10, 5, 2) == [(0, 5, 1), (3, 8, 5), (6, 10, 8)]

        0 1 2 3 4 5 6 7 8 9
        . x x x x
              . . x x x
                    . . x x

    A document of fewer than two tokens has nothing to score, hence no windows. Raises `ValueError` unless
    `0 < overlap < size`: without overlap the first token of a window would have no context.
    """
    if not 0 < overlap < size:
        raise ValueError(f"overlap must lie between 1 and the window less one ({size - 1}), got {overlap}")
    plan: list[tuple[int, int, int]] = []
    score_from = 1
    while score_from < n_tokens:
        begin = max(0, score_from - overlap) if plan else 0
        end = min(n_tokens, begin + size)
        plan.append((begin, end, score_from))
        score_from = end
    return plan


def slices(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive items whose sizes add up to at most `most`; a larger item is a range of its own."""
    begin = total = 0
    for index, size in enumerate(sizes):
        if index > begin and total + size > most:
            yield begin, index
            begin, total = index, 0
        total += size
    if begin < len(sizes):
        yield begin, len(sizes)
