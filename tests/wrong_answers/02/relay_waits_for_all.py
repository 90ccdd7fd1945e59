"""Receives all pieces before it hands on the first."""

import numpy as np

MESSAGE = "every rank waits for all pieces before it hands on the first"


def relay(comm, x, pieces):
    parts = np.split(x.copy(), pieces)
    if comm.rank > 0:
        parts = [comm.recv(comm.rank - 1) for _ in parts]
    if comm.rank < comm.size - 1:
        for piece in parts:
            comm.send(piece, comm.rank + 1)
    return np.concatenate(parts)
