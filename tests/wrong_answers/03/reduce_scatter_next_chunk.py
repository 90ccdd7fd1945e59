"""The ring of the walkthrough: rank r ends with chunk r+1."""

import numpy as np

MESSAGE = "has the finished chunk r+1"


def ring_reduce_scatter(comm, x):
    chunks = np.split(x.copy(), comm.size)
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(comm.size - 1):
        sending = comm.isend(chunks[(comm.rank - step) % comm.size], after)
        received = comm.recv(before)
        sending.wait()
        chunks[(comm.rank - step - 1) % comm.size] += received
    return chunks[(comm.rank + 1) % comm.size].copy()
