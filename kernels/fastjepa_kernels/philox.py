"""Philox4x32-10, the counter-based random generator (Salmon et al., SC 2011) behind sample order, crops and masks.

A counter-based generator has no state: its numbers are a pure function of (seed, domain, index, ...). Any rank on any device
computes the same ones in any order, and a resumed run needs nothing but the step number.

32-bit words are held in int64: the product of two words wraps modulo 2^64, and an arithmetic shift followed by a 32-bit mask
still yields its upper half.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int64]

# One counter word says what the numbers are for, so that no two uses share a stream.
DOMAIN_ORDER, DOMAIN_CROP, DOMAIN_BLOCK_SIZE, DOMAIN_BLOCK_POSITION, DOMAIN_BUDGET, DOMAIN_REPLACEMENT = range(1, 7)

_MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(
    c0: Words, c1: Words | int, c2: Words | int, c3: Words | int, *, seed: int
) -> tuple[Words, Words, Words, Words]:
    """Four random 32-bit words for every counter (c0, c1, c2, c3).

    Args:
        c0: int64 array of any shape, values in [0, 2^32).
        c1, c2, c3: arrays that broadcast against c0, or ints, in [0, 2^32).
        seed: the 64-bit key, in [0, 2^64).

    Returns:
        Four int64 arrays of the broadcast shape, uniform in [0, 2^32).
    """
    m0, m1, half, mask = map(np.array, (_M0, _M1, 32, _MASK32))  # NumPy takes twice as long with Python's numbers
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    zero = c0 * 0
    x0, x1, x2, x3 = c0, zero + c1, zero + c2, zero + c3
    for _ in range(10):
        p0, p1 = x0 * m0, x2 * m1
        x0 = ((p1 >> half) ^ x1 ^ np.array(k0)) & mask
        x2 = ((p0 >> half) ^ x3 ^ np.array(k1)) & mask
        x1, x3 = p1, p0  # the next round's masks take their upper halves away
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return x0, x1 & mask, x2, x3 & mask


def uniform_int(word: Words, bound: Words | int) -> Words:
    """Integers uniform in [0, bound) from 32-bit words, by multiplication and shift: no division, no floating point.

    The bias is below bound / 2^32. `bound` must lie in [1, 2^31).
    """
    return (word * bound) >> 32


def unit_interval(word: Words) -> npt.NDArray[np.float64]:
    """float64 values uniform in [0, 1) from 32-bit words: exact multiples of 2^-32."""
    return np.multiply(word, 2.0**-32, dtype=np.float64)
