"""The random generator: it is the published algorithm, and its numbers are uniform."""

import numpy as np

from fastjepa_kernels.philox import philox4x32, uniform_int, unit_interval


def test_known_answers() -> None:
    """The words equal the known-answer vectors of the Random123 distribution (philox4x32, 10 rounds)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones << 32) | ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0x299F31D0 << 32) | 0xA4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        words = philox4x32(np.array([counter[0]], dtype=np.int64), *counter[1:], seed=key)
        assert tuple(int(w[0]) for w in words) == expected


def test_integers_and_floats_are_uniform() -> None:
    words = philox4x32(np.arange(200_000, dtype=np.int64), 0, 0, 0, seed=1)[0]
    counts = np.bincount(uniform_int(words, 7), minlength=7)
    assert counts.size == 7
    expected = words.size / 7
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 22.5  # chi-square, 6 degrees of freedom, p = 0.001
    u = unit_interval(words)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / words.size) ** 0.5
