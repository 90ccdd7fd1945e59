"""What comes is added to what is there, as in an all-reduce."""

import numpy as np

MESSAGE = "is every piece stored and handed on just as it came?"


def relay(comm, x, pieces):
    out = x.copy()
    for piece in np.split(out, pieces):
        if comm.rank > 0:
            piece += comm.recv(comm.rank - 1)
        if comm.rank < comm.size - 1:
            comm.send(piece, comm.rank + 1)
    return out
