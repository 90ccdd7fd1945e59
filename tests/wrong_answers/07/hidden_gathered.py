"""The hidden features are gathered on every rank between the two layers: right numbers, needless traffic."""

import numpy as np

MESSAGE = "nothing is gathered between"


def column_row_mlp(comm, x, w1, b1, w2, b2):
    h = np.maximum(x @ w1.T + b1, 0)
    counts = comm.all_gather(np.array([h.shape[1]])).tolist()
    whole = comm.all_gather(np.ascontiguousarray(h.T), counts).T
    start = sum(counts[: comm.rank])
    y = comm.all_reduce(whole[:, start : start + counts[comm.rank]] @ w2.T) + b2

    def backward(g):
        dh = g @ w2 * (h > 0)
        return comm.all_reduce(dh @ w1), dh.T @ x, dh.sum(axis=0), g.T @ h, g.sum(axis=0)

    return y, backward
