"""Words outside the range are clipped to it, so every rank adds some row for every word."""

import numpy as np

MESSAGE = "was given the range's first or last row"


def vocabulary_embedding(comm, table, ids, start):
    found = np.clip(ids - start, 0, len(table) - 1)

    def backward(g):
        gradient = np.zeros_like(table)
        np.add.at(gradient, found, g)
        return gradient

    return comm.all_reduce(table[found]), backward
