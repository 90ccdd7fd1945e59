"""Backward subtracts 1 on every rank, clipping the targets of other ranks into its own range."""

import numpy as np

MESSAGE = "only the rank that holds the target does"


def vocabulary_cross_entropy(comm, logits, targets, start):
    n, width = logits.shape
    shifted = logits - comm.all_reduce(logits.max(axis=1), op="max")[:, None]
    here = np.nonzero((targets >= start) & (targets < start + width))[0]
    sums = np.zeros((2, n))
    sums[0] = np.exp(shifted).sum(axis=1)
    sums[1, here] = shifted[here, targets[here] - start]
    total, target = comm.all_reduce(sums)

    def backward(g):
        gradient = np.exp(shifted) / total[:, None]
        gradient[np.arange(n), np.clip(targets - start, 0, width - 1)] -= 1
        return gradient * g[:, None]

    return np.log(total) - target, backward
