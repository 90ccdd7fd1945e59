"""Even ranks send first and odd ranks receive first: no deadlock, but half of the wires idle."""

import numpy as np

MESSAGE = "Some ranks wait for others before they send"


def ring_reduce_scatter(comm, x):
    chunks = np.split(x.copy(), comm.size)
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for step in range(comm.size - 1):
        if comm.rank % 2 == 0:
            comm.send(chunks[(comm.rank - step - 1) % comm.size], after)
            received = comm.recv(before)
        else:
            received = comm.recv(before)
            comm.send(chunks[(comm.rank - step - 1) % comm.size], after)
        chunks[(comm.rank - step - 2) % comm.size] += received
    return chunks[comm.rank].copy()
