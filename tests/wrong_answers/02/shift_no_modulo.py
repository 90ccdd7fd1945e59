"""Forgets that the ring closes."""

MESSAGE = "the ranks of world are 0 to"


def shift(comm, x, distance):
    sending = comm.isend(x, comm.rank + distance)
    received = comm.recv(comm.rank - distance)
    sending.wait()
    return received
