"""Rank 0 begins and every other rank receives first: one message after the other."""

MESSAGE = "messages one after the other: each rank waits for its neighbour"


def shift(comm, x, distance):
    if comm.size == 1 or distance % comm.size == 0:
        return x.copy()
    dest, source = (comm.rank + distance) % comm.size, (comm.rank - distance) % comm.size
    if comm.rank < distance % comm.size:  # one rank of each circle begins
        sending = comm.isend(x, dest)
        received = comm.recv(source)
        sending.wait()
        return received
    received = comm.recv(source)
    comm.send(x, dest)
    return received
