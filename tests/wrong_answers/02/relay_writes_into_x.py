"""Returns the array that it was given."""

import numpy as np

MESSAGE = "the result is promised to be fresh memory"


def relay(comm, x, pieces):
    for piece in np.split(x, pieces):
        if comm.rank > 0:
            piece[...] = comm.recv(comm.rank - 1)
        if comm.rank < comm.size - 1:
            comm.send(piece, comm.rank + 1)
    return x
