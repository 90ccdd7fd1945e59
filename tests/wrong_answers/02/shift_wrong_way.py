"""Sends to the left what should go to the right."""

MESSAGE = "the arrays went the wrong way"


def shift(comm, x, distance):
    sending = comm.isend(x, (comm.rank - distance) % comm.size)
    received = comm.recv((comm.rank + distance) % comm.size)
    sending.wait()
    return received
