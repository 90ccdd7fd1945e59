"""The sum is float32, and divided by the number of pieces."""

import numpy as np

MESSAGE = "divides by the number of pieces"


def accumulated_gradient(weights, pieces, gradient_of, scale):
    total = np.zeros(weights.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in pieces:
            total += gradient_of(weights, piece, scale)
        gradient = total / np.float32(scale) / np.float32(len(pieces))
    return gradient, bool(not np.isfinite(gradient).all())
