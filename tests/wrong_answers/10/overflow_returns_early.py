"""A rank that has found an infinity returns at once, without the all-reduce."""

import numpy as np

MESSAGE = "a rank returned without the all-reduce"


def any_overflow(comm, gradients):
    for g in gradients:
        if not np.isfinite(g).all():
            return True
    return bool(comm.all_reduce(np.array([False], np.uint8), op="max")[0])
