"""splitmix64 on NumPy and on torch against the published algorithm on Python's integers."""

import numpy as np
import pytest
import torch

from lacy.schemas.hashing import shift, signed, splitmix64

MASK = (1 << 64) - 1
VALUES = [0, 1, 42, 1 << 31, 1 << 63, MASK, 0x9E3779B97F4A7C15]


def published(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_the_bits_are_those_of_the_published_algorithm(array) -> None:
    x = array([signed(value) for value in VALUES])
    assert [int(value) & MASK for value in splitmix64(x)] == [published(value) for value in VALUES]
    assert [int(value) for value in shift(x, 33)] == [value >> 33 for value in VALUES]


def test_the_first_output_of_the_seed_0() -> None:
    assert int(splitmix64(np.array([0]))[0]) & MASK == 0xE220A8397B1DCDAF
