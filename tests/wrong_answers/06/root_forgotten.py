"""The sum of squares is used as the norm."""

import numpy as np

from minipar.comm import balanced

MESSAGE = "the root is missing"


def clipped_step(comm, weights, gradient, lr, max_norm):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    mine = comm.reduce_scatter(gradient, counts)
    norm = comm.all_reduce(np.array([np.sum(mine**2)]))[0]
    scale = min(1.0, max_norm / norm) if norm > 0 else 1.0
    own = weights[start : start + counts[comm.rank]] - lr * scale * mine
    return comm.all_gather(own, counts)
