"""splitmix64's mixing function (Steele, Lea and Flood 2014), the same bits from NumPy and from torch.

torch has no unsigned 64-bit arithmetic, so values are int64; all arithmetic is modulo 2**64.
"""

from typing import Any, TypeVar

A = TypeVar("A", bound=Any)  # an int64 array of NumPy, at least one-dimensional, or an int64 tensor of torch


def splitmix64(x: A) -> A:
    """Mix each int64 value."""
    x = x + signed(0x9E3779B97F4A7C15)
    x = (x ^ shift(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ shift(x, 31)


def shift(x: A, bits: int) -> A:
    """int64 values shifted right as if they had no sign; `bits` is at least 1."""
    return x >> bits & (1 << 64 - bits) - 1


def signed(x: int) -> int:
    """x modulo 2**64 as an int64."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
