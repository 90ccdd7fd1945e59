"""Elements that were zero before count as lost."""

import numpy as np

MESSAGE = "only elements that were not zero can vanish"


def lost_share(g, scale=1.0):
    half = (g * np.float32(scale)).astype(np.float16)
    there = g != 0
    n = g.size
    if n == 0:
        return 0.0, 0.0
    return float((half == 0).sum() / n), float(np.isinf(half[there]).sum() / n)
