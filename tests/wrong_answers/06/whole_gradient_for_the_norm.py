"""The whole gradient is summed on every rank just to know its norm."""

import numpy as np

from minipar.comm import balanced

MESSAGE = "the whole gradient was sent for it"


def clipped_step(comm, weights, gradient, lr, max_norm):
    counts = balanced(len(weights), comm.size)
    start = sum(counts[: comm.rank])
    whole = comm.all_reduce(gradient)
    scale = min(1.0, max_norm / np.linalg.norm(whole))
    mine = slice(start, start + counts[comm.rank])
    return comm.all_gather(weights[mine] - lr * scale * whole[mine], counts)
