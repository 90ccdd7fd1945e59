"""Everything below 2^-24 counts as lost, though more than half of it is rounded up."""

import numpy as np

MESSAGE = "rounds to the nearest number"


def lost_share(g, scale=1.0):
    half = (g * np.float32(scale)).astype(np.float16)
    there = g != 0
    n = int(there.sum())
    if n == 0:
        return 0.0, 0.0
    return float((np.abs(g[there] * scale) < 2.0**-24).sum() / n), float(np.isinf(half[there]).sum() / n)
