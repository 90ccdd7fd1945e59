"""Sends to and receives from the same rank."""

MESSAGE = "all ranks wait in a circle"


def shift(comm, x, distance):
    sending = comm.isend(x, (comm.rank + distance) % comm.size)
    received = comm.recv((comm.rank + distance) % comm.size)
    sending.wait()
    return received
