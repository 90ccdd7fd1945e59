"""The float16 gradients are summed as they are, and the sum is cast."""

import numpy as np

MESSAGE = "casting its result comes too late"


def sum_gradients(comm, g):
    return comm.all_reduce(g).astype(np.float32)
