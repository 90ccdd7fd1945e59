"""flatten() copies, so the views are none."""

import math

import numpy as np

MESSAGE = "does not lie in the flat array"


def flat_bucket(shapes, dtype):
    sizes = [math.prod(shape) for shape in shapes]
    flat, views, start = np.zeros(sum(sizes), dtype), [], 0
    for shape, size in zip(shapes, sizes):
        views.append(flat[start : start + size].reshape(shape).copy())
        start += size
    return flat, views
