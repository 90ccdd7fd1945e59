"""Only infinities are looked for."""

import numpy as np

MESSAGE = "does not see a NaN"


def any_overflow(comm, gradients):
    mine = any(np.isinf(g).any() for g in gradients)
    return bool(comm.all_reduce(np.array([mine], np.uint8), op="max")[0])
