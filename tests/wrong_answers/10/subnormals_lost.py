"""Everything below the smallest normal number counts as lost."""

import numpy as np

MESSAGE = "They are subnormal"


def lost_share(g, scale=1.0):
    half = (g * np.float32(scale)).astype(np.float16)
    there = g != 0
    n = int(there.sum())
    if n == 0:
        return 0.0, 0.0
    lost = np.abs(g[there] * scale) < np.finfo(np.float16).tiny
    return float(lost.sum() / n), float(np.isinf(half[there]).sum() / n)
