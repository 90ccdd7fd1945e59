"""One step too few: the last rank's part is missing."""

import numpy as np

MESSAGE = "one step too few"


def ring_reduce_scatter(comm, x):
    chunks = np.split(x.copy(), comm.size)
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(comm.size - 2):
        sending = comm.isend(chunks[(comm.rank - step - 1) % comm.size], after)
        received = comm.recv(before)
        sending.wait()
        chunks[(comm.rank - step - 2) % comm.size] += received
    return chunks[comm.rank].copy()
