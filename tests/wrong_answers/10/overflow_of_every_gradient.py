"""One all-reduce for each gradient, though ranks hold different numbers of them."""

import numpy as np

MESSAGE = "a rank returned without the all-reduce"


def any_overflow(comm, gradients):
    found = False
    for g in gradients:
        mine = np.array([not np.isfinite(g).all()], np.uint8)
        found = bool(comm.all_reduce(mine, op="max")[0]) or found
    return found
