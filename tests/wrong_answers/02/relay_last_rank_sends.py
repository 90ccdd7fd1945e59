"""The last rank sends on around the ring."""

import numpy as np

MESSAGE = "rank 0 has nobody to receive from, and the last rank nobody to send to"


def relay(comm, x, pieces):
    whole = x.copy()
    for piece in np.split(whole, pieces):
        if comm.rank > 0:
            piece[...] = comm.recv(comm.rank - 1)
        comm.send(piece, (comm.rank + 1) % comm.size)
    return whole
