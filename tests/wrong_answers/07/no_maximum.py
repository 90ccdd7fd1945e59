"""Nothing is subtracted before the exponential, so large logits overflow."""

import numpy as np

MESSAGE = "exp overflows"


def vocabulary_cross_entropy(comm, logits, targets, start):
    n, width = logits.shape
    here = np.nonzero((targets >= start) & (targets < start + width))[0]
    column = targets[here] - start
    sums = np.zeros((2, n))
    sums[0] = np.exp(logits).sum(axis=1)
    sums[1, here] = logits[here, column]
    total, target = comm.all_reduce(sums)

    def backward(g):
        gradient = np.exp(logits) / total[:, None]
        gradient[here, column] -= 1
        return gradient * g[:, None]

    return np.log(total) - target, backward
