"""Calls the communicator's own all_reduce and cuts out a chunk."""

import numpy as np

MESSAGE = "all_reduce was called"


def ring_reduce_scatter(comm, x):
    return np.split(comm.all_reduce(x), comm.size)[comm.rank].copy()
