"""Each rank returns the norm of what it holds."""

import numpy as np

MESSAGE = "add the squares up over the ranks first"


def gradient_norm(comm, held):
    return float(np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g, _ in held)))
