"""Each rank subtracts the largest of its own logits before the exponentials are added."""

import numpy as np

MESSAGE = "the exponentials of different ranks are then scaled differently"


def vocabulary_cross_entropy(comm, logits, targets, start):
    n, width = logits.shape
    shifted = logits - logits.max(axis=1)[:, None]
    here = np.nonzero((targets >= start) & (targets < start + width))[0]
    column = targets[here] - start
    sums = np.zeros((2, n))
    sums[0] = np.exp(shifted).sum(axis=1)
    sums[1, here] = shifted[here, column]
    total, target = comm.all_reduce(sums)

    def backward(g):
        gradient = np.exp(shifted) / total[:, None]
        gradient[here, column] -= 1
        return gradient * g[:, None]

    return np.log(total) - target, backward
