"""One all-reduce for each array, though the ranks' lists differ in length."""

import numpy as np

MESSAGE = "do not all call the same collective"


def gradient_norm(comm, held):
    total = 0.0
    for g, copies in held:
        square = np.array([np.sum(g.astype(np.float64) ** 2) / copies])
        total += float(comm.all_reduce(square)[0])
    return total**0.5
