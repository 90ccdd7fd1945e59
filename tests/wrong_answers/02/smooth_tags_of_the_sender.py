"""Receives with the tag of its own message to that side: nobody sends that."""

import numpy as np

MESSAGE = "a tag that is sent must be the one that is received"


def smooth(comm, u, steps):
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    u = u.copy()
    for _ in range(steps):
        to_left = comm.isend(u[:1], left, 1)
        to_right = comm.isend(u[-1:], right, 2)
        from_left = comm.recv(left, 1)
        from_right = comm.recv(right, 2)
        to_left.wait()
        to_right.wait()
        wide = np.concatenate([from_left, u, from_right])
        u = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4
    return u
