"""The bug hunt as it was: with two ranks the two messages are mistaken for each other."""

import numpy as np

MESSAGE = "What tells messages between the same two ranks apart?"


def smooth(comm, u, steps):
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    u = u.copy()
    for _ in range(steps):
        to_left = comm.isend(u[:1], left)
        to_right = comm.isend(u[-1:], right)
        from_left = comm.recv(left)
        from_right = comm.recv(right)
        to_left.wait()
        to_right.wait()
        wide = np.concatenate([from_left, u, from_right])
        u = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4
    return u
