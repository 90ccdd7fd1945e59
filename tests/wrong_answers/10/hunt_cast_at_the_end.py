"""The cast is written before the unscaling more clearly; the sum is still float16."""

import numpy as np

MESSAGE = "less than half its last bit"


def accumulated_gradient(weights, pieces, gradient_of, scale):
    with np.errstate(over="ignore", invalid="ignore"):
        total = sum((gradient_of(weights, piece, scale) for piece in pieces), np.zeros(weights.shape, np.float16))
        gradient = total.astype(np.float32)
        gradient /= np.float32(scale)
    return gradient, bool(not np.isfinite(gradient).all())
