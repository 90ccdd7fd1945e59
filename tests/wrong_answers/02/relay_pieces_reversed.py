"""The pieces are joined as if the last one had come first."""

import numpy as np

MESSAGE = "has the values of rank 0 in another order"


def relay(comm, x, pieces):
    parts = []
    for piece in np.split(x, pieces):
        if comm.rank > 0:
            piece = comm.recv(comm.rank - 1)
        if comm.rank < comm.size - 1:
            comm.send(piece, comm.rank + 1)
        parts.append(piece)
    return np.concatenate(parts if comm.rank == 0 else parts[::-1])
