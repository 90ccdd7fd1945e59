"""Every rank adds the whole bias to its own term, so the sum has it once a rank."""

import numpy as np

MESSAGE = "once by every rank before the sum"


def column_row_mlp(comm, x, w1, b1, w2, b2):
    h = np.maximum(x @ w1.T + b1, 0)
    y = comm.all_reduce(h @ w2.T + b2)

    def backward(g):
        dh = g @ w2 * (h > 0)
        return comm.all_reduce(dh @ w1), dh.T @ x, dh.sum(axis=0), g.T @ h, g.sum(axis=0)

    return y, backward
