"""The root is ignored: the tree always starts at rank 0."""

MESSAGE = "count ranks from the root"


def tree_broadcast(comm, x, root=0):
    have, distance = x.copy(), 1
    while distance < comm.size:
        if comm.rank < distance and comm.rank + distance < comm.size:
            comm.send(have, comm.rank + distance)
        elif distance <= comm.rank < 2 * distance:
            have = comm.recv(comm.rank - distance)
        distance *= 2
    return have
