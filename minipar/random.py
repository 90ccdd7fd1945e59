"""Random numbers as a function of *where* they are used, not of how many were drawn before.

Every number is a hash of (stream, index). The stream is named by what it is for, such as
(seed, "h.3.mlp.weight") or (seed, step, "h.3.drop"), the index is the element's position in the *global*
array. So a rank that holds a slice draws exactly the serial run's values for that slice, whatever the
layout, and a checkpoint needs no generator state: seed and step are enough.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

import numpy as np

from minipar.backend import Array

GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment: 2**64 / golden ratio, made odd
_MASK = 2**64 - 1


def stream(*parts: int | str) -> int:
    """Return the 64-bit key of the stream named by `parts`, the same on every machine and in every run."""
    name = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def bits(key: int, start: int, count: int) -> Array:
    """Return elements `start … start + count` of a stream as uint64 (count,).

    SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17): a
    counter times an odd constant, then a bijective mix. A plain function of the counter, hence of position.
    """
    z = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z *= np.uint64(GAMMA)
    z += np.uint64(key & _MASK)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def uniform(key: int, start: int, count: int) -> Array:
    """Return float64 (count,) uniform in [0, 1): the upper 53 bits of each element."""
    return (bits(key, start, count) >> np.uint64(11)) * 2.0**-53


def normal(key: int, start: int, count: int) -> Array:
    """Return float64 (count,) of the standard normal law, by Box and Muller (1958).

    Both uniforms come from one element, 32 bits each, so that a value depends on its own index alone.
    """
    z = bits(key, start, count)
    radius = ((z >> np.uint64(32)) + 0.5) * 2.0**-32  # in (0, 1), so that the logarithm is finite
    angle = (z & np.uint64(0xFFFFFFFF)) * (2.0**-32 * 2.0 * np.pi)
    return np.sqrt(-2.0 * np.log(radius)) * np.cos(angle)


@dataclass(frozen=True)
class Moment:
    """When and where the program draws: the part of a stream's name that the training loop knows.

    Attributes:
        seed: the run's seed.
        step: the optimizer step, counted from 0.
        first_sample: position in the global batch of the first sample at hand, so that a rank's shard or a
            microbatch draws the same dropout mask as the serial run does for these samples.
    """

    seed: int = 0
    step: int = 0
    first_sample: int = 0


_START = Moment()
_moment: ContextVar[Moment] = ContextVar("moment", default=_START)


def moment() -> Moment:
    """Return the moment that holds for this rank and thread."""
    return _moment.get()


@contextlib.contextmanager
def at(
    *, seed: int | None = None, step: int | None = None, first_sample: int | None = None
) -> Iterator[Moment]:
    """Set seed, step or first sample for the code inside; what is not named stays as it was."""
    named = {"seed": seed, "step": step, "first_sample": first_sample}
    token = _moment.set(replace(_moment.get(), **{k: v for k, v in named.items() if v is not None}))
    try:
        yield _moment.get()
    finally:
        _moment.reset(token)
