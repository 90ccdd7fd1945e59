"""What several ranks hold enters the norm once for each of them."""

import numpy as np

MESSAGE = "counted once for each of them"


def gradient_norm(comm, held):
    mine = sum(float(np.sum(g.astype(np.float64) ** 2)) for g, _ in held)
    return float(np.sqrt(comm.all_reduce(np.array([mine], np.float64))[0]))
