"""One piece too few: an off-by-one."""

MESSAGE = "still has its own values from element"


def relay(comm, x, pieces):
    whole = x.copy()
    length = len(x) // pieces
    for i in range(max(pieces - 1, 1)):
        piece = whole[i * length : (i + 1) * length]
        if comm.rank > 0:
            piece[...] = comm.recv(comm.rank - 1)
        if comm.rank < comm.size - 1:
            comm.send(piece, comm.rank + 1)
    return whole
