"""Randomness without state: any element of a random stream as a pure function of (key, index).

This is why a dropout mask is the same on one rank and on eight: each rank hashes the global indices of the
elements it holds.
"""

from __future__ import annotations

import math

import numpy as np

from minipar.backend import array_module
from minipar.kernels.common import Array, keep_threshold


def splitmix64(key: int, index: Array) -> Array:
    """Element `index` (uint64 array) of the SplitMix64 stream seeded by `key` (Steele, Lea & Flood 2014).

    A pure function of (key, index): any rank computes any part of the stream without the rest.
    """
    xp = array_module(index)
    z = (index + xp.uint64(1)) * xp.uint64(0x9E3779B97F4A7C15) + xp.uint64(key % 2**64)
    z = (z ^ (z >> xp.uint64(30))) * xp.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> xp.uint64(27))) * xp.uint64(0x94D049BB133111EB)
    return z ^ (z >> xp.uint64(31))


def dropout_mask(shape: tuple[int, ...], p: float, key: int, start: int = 0, xp=np) -> Array:
    """Boolean keep-mask: the element at flat position i is kept iff hash(key, start + i) as a uniform ≥ p.

    The uniform is the top 53 bits of splitmix64 times 2^-53, so an element's fate depends on its global
    index `start + i` alone, whatever the layout. Raises UsageError for p outside 0..1.
    """
    threshold, size = keep_threshold(p), math.prod(shape)
    if threshold >= 2**64:  # p = 1 drops everything
        return xp.zeros(shape, bool)
    index = xp.arange(size, dtype=xp.uint64) + xp.uint64(start)
    return (splitmix64(key, index) >= xp.uint64(threshold)).reshape(shape)
