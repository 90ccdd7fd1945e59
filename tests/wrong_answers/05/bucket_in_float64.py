"""The dtype is forgotten."""

import math

import numpy as np

MESSAGE = "was asked for"


def flat_bucket(shapes, dtype):
    sizes = [math.prod(shape) for shape in shapes]
    flat, views, start = np.zeros(sum(sizes)), [], 0
    for shape, size in zip(shapes, sizes):
        views.append(flat[start : start + size].reshape(shape))
        start += size
    return flat, views
