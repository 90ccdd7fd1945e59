"""The gradient is divided by its copies before it is squared."""

import numpy as np

MESSAGE = "before it is squared"


def gradient_norm(comm, held):
    mine = sum(float(np.sum((g.astype(np.float64) / copies) ** 2)) for g, copies in held)
    return float(np.sqrt(comm.all_reduce(np.array([mine], np.float64))[0]))
