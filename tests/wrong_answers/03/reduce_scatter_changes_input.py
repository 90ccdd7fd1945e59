"""np.split gives views, so the caller's array is summed into."""

import numpy as np

MESSAGE = "own array was changed"


def ring_reduce_scatter(comm, x):
    chunks = np.split(x, comm.size)
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(comm.size - 1):
        sending = comm.isend(chunks[(comm.rank - step - 1) % comm.size], after)
        received = comm.recv(before)
        sending.wait()
        chunks[(comm.rank - step - 2) % comm.size] += received
    return chunks[comm.rank].copy()
