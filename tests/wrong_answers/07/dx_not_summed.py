"""The gradient of x is that of this rank's features alone: copy_to's backward was forgotten."""

import numpy as np

MESSAGE = "every layer below trains on a wrong gradient"


def column_row_mlp(comm, x, w1, b1, w2, b2):
    h = np.maximum(x @ w1.T + b1, 0)
    y = comm.all_reduce(h @ w2.T) + b2

    def backward(g):
        dh = g @ w2 * (h > 0)
        return dh @ w1, dh.T @ x, dh.sum(axis=0), g.T @ h, g.sum(axis=0)

    return y, backward
