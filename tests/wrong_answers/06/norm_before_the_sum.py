"""Each rank's gradient enters the norm before the gradients are summed."""

import numpy as np

from minipar.comm import balanced

MESSAGE = "before they were summed"


def clipped_step(comm, weights, gradient, lr, max_norm):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    norm = comm.all_reduce(np.array([np.sum(gradient**2)]))[0] ** 0.5
    mine = comm.reduce_scatter(gradient, counts)
    own = weights[start : start + counts[comm.rank]] - lr * min(1.0, max_norm / norm) * mine
    return comm.all_gather(own, counts)
