"""Each rank decides by its own gradients."""

import numpy as np

MESSAGE = "each rank answers for itself"


def any_overflow(comm, gradients):
    return any(not np.isfinite(g).all() for g in gradients)
