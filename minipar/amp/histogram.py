"""Histograms of exponents: how large numbers are, in powers of two, and what float16 makes of them.

        2^-24          2^-14                              2^16
    vanish │ subnormal │ normal: ten bits of fraction      │ overflow

Scaling a tensor by 2^k shifts its histogram by k bins, so one histogram of unscaled gradients tells what
would become of them under any loss scale. Scaling by another number moves bins across float16's limits in
part: such a bin counts in proportion, as if its elements were spread evenly over its power of two.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np

from minipar.backend import Array, array_module, to_host

LOWEST, HIGHEST = -150, 128  # exponents of float32, its subnormals included; other numbers go to the ends
BINS = HIGHEST - LOWEST + 1
SMALLEST, NORMAL, OVERFLOW = (
    -24,
    -14,
    16,
)  # float16: smallest subnormal, smallest normal, first power above 65504


class ExponentHistogram:
    """Counts of floor(log2|x|), of zeros, and of infinities and NaN.

    Attributes:
        counts: int64 (BINS + 2,): bins for exponents LOWEST … HIGHEST, then zeros, then what is not finite. A
            plain array, so that the statistics of several ranks are its sum over them.
    """

    def __init__(self, counts: Array | None = None):
        self.counts: Array = np.zeros(BINS + 2, np.int64) if counts is None else counts

    def add(self, x: Array) -> Self:
        """Count the elements of a floating array of any shape."""
        xp = array_module(x)
        flat = x.reshape(-1)
        finite = xp.isfinite(flat)
        kept = flat[finite]
        mantissa, exponent = xp.frexp(kept)  # |mantissa| in [0.5, 1), or 0
        nonzero = mantissa != 0
        bins = xp.clip(exponent[nonzero] - 1, LOWEST, HIGHEST) - LOWEST
        self.counts[:BINS] += to_host(xp.bincount(bins, minlength=BINS))
        self.counts[BINS] += kept.size - int(nonzero.sum())
        self.counts[BINS + 1] += flat.size - kept.size
        return self

    def state(self) -> dict[str, int]:
        """Return the counts that are not zero, by bin."""
        return {str(i): int(self.counts[i]) for i in np.flatnonzero(self.counts)}

    @classmethod
    def from_state(cls, state: dict[str, int]) -> Self:
        """Return the histogram of which `state` gave this."""
        histogram = cls()
        for i, count in state.items():
            histogram.counts[int(i)] = count
        return histogram

    @property
    def exponents(self) -> Array:
        """The exponent of each bin, (BINS,)."""
        return np.arange(LOWEST, HIGHEST + 1)

    @property
    def nonzero(self) -> int:
        """Elements that are finite and not zero."""
        return int(self.counts[:BINS].sum())

    @property
    def nonfinite(self) -> int:
        """Infinities and NaN."""
        return int(self.counts[BINS + 1])

    def share(self, low: float = -math.inf, high: float = math.inf, scale: float = 1.0) -> float:
        """Return the share of non-zero elements with low ≤ log2|scale · x| < high."""
        start = self.exponents + math.log2(scale)
        inside = np.clip(np.minimum(start + 1, high) - np.maximum(start, low), 0, 1)  # of each bin, (BINS,)
        return float((self.counts[:BINS] * inside).sum()) / max(self.nonzero, 1)

    def vanishing(self, scale: float = 1.0) -> float:
        """Return the share that float16 rounds to zero: below half its smallest number."""
        return self.share(high=SMALLEST - 1, scale=scale)

    def overflowing(self, scale: float = 1.0) -> float:
        """Return the share that is infinite in float16, infinities and NaN included."""
        total = max(self.nonzero + self.nonfinite, 1)
        return (self.share(low=OVERFLOW, scale=scale) * self.nonzero + self.nonfinite) / total

    def largest(self) -> int | None:
        """Return the largest exponent, None if every element is zero."""
        found = np.flatnonzero(self.counts[:BINS])
        return int(found[-1]) + LOWEST if len(found) else None
