"""Each rank returns the term of its own hidden features."""

import numpy as np

MESSAGE = "each rank returned its own features' term of y"


def column_row_mlp(comm, x, w1, b1, w2, b2):
    h = np.maximum(x @ w1.T + b1, 0)

    def backward(g):
        dh = g @ w2 * (h > 0)
        return comm.all_reduce(dh @ w1), dh.T @ x, dh.sum(axis=0), g.T @ h, g.sum(axis=0)

    return h @ w2.T + b2, backward
