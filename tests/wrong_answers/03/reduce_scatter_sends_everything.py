"""The whole running total travels in every step."""

import numpy as np

MESSAGE = "was the whole array sent"


def ring_reduce_scatter(comm, x):
    total, passing = x.copy(), x
    for _ in range(comm.size - 1):
        sending = comm.isend(passing, (comm.rank + 1) % comm.size)
        passing = comm.recv((comm.rank - 1) % comm.size)
        sending.wait()
        total += passing
    return np.split(total, comm.size)[comm.rank].copy()
