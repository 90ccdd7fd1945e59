"""A scalar, of shape (), is taken for empty."""

import math

import numpy as np

MESSAGE = "all elements together are"


def flat_bucket(shapes, dtype):
    sizes = [math.prod(shape) if shape else 0 for shape in shapes]
    flat, views, start = np.zeros(sum(sizes), dtype), [], 0
    for shape, size in zip(shapes, sizes):
        views.append(flat[start : start + size].reshape(shape or (0,)))
        start += size
    return flat, views
