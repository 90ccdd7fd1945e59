"""Every rank sends up, then down, then receives: a ring of ranks that wait for each other."""

import numpy as np

MESSAGE = "the ranks wait for each other without end"


def convolve_rows(comm, rows, kernel):
    n, half = len(rows), len(kernel) // 2
    above = below = np.zeros((half, rows.shape[1]))
    if comm.rank > 0:
        comm.send(rows[:half].copy(), comm.rank - 1)
    if comm.rank + 1 < comm.size:
        comm.send(rows[n - half :].copy(), comm.rank + 1)
    if comm.rank > 0:
        above = comm.recv(comm.rank - 1)
    if comm.rank + 1 < comm.size:
        below = comm.recv(comm.rank + 1)
    image = np.concatenate([above, rows, below])
    return sum(kernel[k] * image[k : k + n] for k in range(len(kernel)))
