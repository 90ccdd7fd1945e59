"""The sum is divided by the number of ranks."""

import numpy as np

MESSAGE = "returns the mean"


def sum_gradients(comm, g):
    return comm.all_reduce(g.astype(np.float32)) / np.float32(comm.size)
