"""Initialisers: what a parameter starts as, element by element, as a function of (seed, name, index).

Because each element depends on its own index alone, a rank that holds a slice of a parameter computes that
slice and nothing else, and gets exactly the numbers the serial run gets.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from minipar import random
from minipar.backend import Array

Slices = tuple[slice, ...]


class Initialiser:
    """The law of one parameter's elements. `draw` gives a run of them by flat index, in float64."""

    def draw(self, key: int, start: int, count: int) -> Array:
        raise TypeError(f"{type(self).__name__} does not say how to draw; use one of the initialisers below")

    def fill(self, key: int, shape: tuple[int, ...], part: Slices | None = None) -> Array:
        """Return the elements `part` (a slice per axis; None: all) of an array of `shape`, float64."""
        if part is None:
            return self.draw(key, 0, math.prod(shape)).reshape(shape)
        if any(s.step not in (None, 1) for s in part):
            raise ValueError(f"initialiser: the part {part} must be made of slices with step 1")
        bounds = [s.indices(n)[:2] for s, n in zip(part, shape, strict=True)]
        lengths = [max(stop - start, 0) for start, stop in bounds]
        # The last axis that is cut, and all after it, form one contiguous run of memory for each outer index.
        cut = max((i for i, n in enumerate(shape) if lengths[i] != n), default=0)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        run = math.prod(lengths[cut:])
        out = np.empty((math.prod(lengths[:cut]), run))
        if out.size:
            first = bounds[cut][0] * strides[cut] if shape else 0
            for row, outer in enumerate(itertools.product(*(range(*b) for b in bounds[:cut]))):
                out[row] = self.draw(key, first + sum(i * s for i, s in zip(outer, strides)), run)
        return out.reshape(lengths)


@dataclass(frozen=True)
class Constant(Initialiser):
    """Every element is `value`."""

    value: float

    def draw(self, key: int, start: int, count: int) -> Array:
        return np.full(count, self.value, dtype=np.float64)


@dataclass(frozen=True)
class Uniform(Initialiser):
    """Uniform in [low, high)."""

    low: float
    high: float

    def draw(self, key: int, start: int, count: int) -> Array:
        return self.low + (self.high - self.low) * random.uniform(key, start, count)


@dataclass(frozen=True)
class Normal(Initialiser):
    """Normal with the given mean and standard deviation."""

    std: float = 1.0
    mean: float = 0.0

    def draw(self, key: int, start: int, count: int) -> Array:
        return self.mean + self.std * random.normal(key, start, count)


def kaiming_uniform(fan_in: int, gain: float = 3**-0.5) -> Uniform:
    """U(±gain·√(3/fan_in)) (He et al. 2015). The default is PyTorch's for Linear and Conv: ±1/√fan_in."""
    bound = gain * (3 / max(fan_in, 1)) ** 0.5
    return Uniform(-bound, bound)


def kaiming_normal(fan_in: int, gain: float = 2**0.5) -> Normal:
    """N(0, gain²/fan_in) (He et al. 2015); the default gain is for ReLU."""
    return Normal(gain / max(fan_in, 1) ** 0.5)


def xavier_uniform(fan_in: int, fan_out: int) -> Uniform:
    """U(±√(6/(fan_in + fan_out))) (Glorot and Bengio 2010)."""
    bound = (6 / (fan_in + fan_out)) ** 0.5
    return Uniform(-bound, bound)
