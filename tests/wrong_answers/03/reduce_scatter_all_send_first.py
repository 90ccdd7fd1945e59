"""Every rank waits for its send before it receives: a deadlock."""

import numpy as np

MESSAGE = "begin with isend, receive, and only then wait"


def ring_reduce_scatter(comm, x):
    chunks = np.split(x.copy(), comm.size)
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(comm.size - 1):
        comm.send(chunks[(comm.rank - step - 1) % comm.size], after)
        chunks[(comm.rank - step - 2) % comm.size] += comm.recv(before)
    return chunks[comm.rank].copy()
