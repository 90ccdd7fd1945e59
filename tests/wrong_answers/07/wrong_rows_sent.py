"""The neighbour below gets the first rows instead of the last ones, and the one above the last."""

import numpy as np

MESSAGE = "at the seams it is not"


def convolve_rows(comm, rows, kernel):
    n, half = len(rows), len(kernel) // 2
    above = below = np.zeros((half, rows.shape[1]))
    sent = []
    if comm.rank + 1 < comm.size:
        sent.append(comm.isend(rows[:half].copy(), comm.rank + 1))
    if comm.rank > 0:
        sent.append(comm.isend(rows[n - half :].copy(), comm.rank - 1))
        above = comm.recv(comm.rank - 1)
    if comm.rank + 1 < comm.size:
        below = comm.recv(comm.rank + 1)
    for work in sent:
        work.wait()
    image = np.concatenate([above, rows, below])
    return sum(kernel[k] * image[k : k + n] for k in range(len(kernel)))
