"""Ignores the number of pieces."""

MESSAGE = "rank 0 sends the whole array in one message"


def relay(comm, x, pieces):
    whole = comm.recv(comm.rank - 1) if comm.rank > 0 else x.copy()
    if comm.rank < comm.size - 1:
        comm.send(whole, comm.rank + 1)
    return whole
