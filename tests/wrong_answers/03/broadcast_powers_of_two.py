"""The rounds are counted with floor(lg N), so some ranks are never reached."""

MESSAGE = "never got the root's values"


def tree_broadcast(comm, x, root=0):
    place, have = (comm.rank - root) % comm.size, x.copy()
    for k in range(comm.size.bit_length() - 1):
        distance = 2**k
        if place < distance:
            comm.send(have, (comm.rank + distance) % comm.size)
        elif place < 2 * distance:
            have = comm.recv((comm.rank - distance) % comm.size)
    return have
