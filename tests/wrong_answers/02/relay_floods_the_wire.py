"""Rank 0 puts all pieces on the wire at once."""

import numpy as np

MESSAGE = "less than a wire allows"


def relay(comm, x, pieces):
    whole = x.copy()
    sending = []
    for piece in np.split(whole, pieces):
        if comm.rank > 0:
            piece[...] = comm.recv(comm.rank - 1)
        if comm.rank < comm.size - 1:
            sending.append(comm.isend(piece, comm.rank + 1))
    for work in sending:
        work.wait()
    return whole
