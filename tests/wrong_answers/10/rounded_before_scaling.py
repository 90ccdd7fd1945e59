"""The gradient is rounded to float16 first and scaled afterwards."""

import numpy as np

MESSAGE = "what has vanished does not come back"


def lost_share(g, scale=1.0):
    half = (g.astype(np.float16) * np.float16(min(scale, 65504.0))).astype(np.float16)
    there = g != 0
    n = int(there.sum())
    if n == 0:
        return 0.0, 0.0
    return float((half[there] == 0).sum() / n), float(np.isinf(half[there]).sum() / n)
