"""Backward reduces the exponentials a second time, although forward has the sum."""

import numpy as np

MESSAGE = "which is all it needs for its own columns"


def vocabulary_cross_entropy(comm, logits, targets, start):
    n, width = logits.shape
    shifted = logits - comm.all_reduce(logits.max(axis=1), op="max")[:, None]
    here = np.nonzero((targets >= start) & (targets < start + width))[0]
    column = targets[here] - start
    sums = np.zeros((2, n))
    sums[0] = np.exp(shifted).sum(axis=1)
    sums[1, here] = shifted[here, column]
    total, target = comm.all_reduce(sums)

    def backward(g):
        gradient = np.exp(shifted)
        gradient /= comm.all_reduce(gradient.sum(axis=1))[:, None]
        gradient[here, column] -= 1
        return gradient * g[:, None]

    return np.log(total) - target, backward
