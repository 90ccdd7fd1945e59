"""Elements that are stored nowhere come back as zeros."""

import numpy as np

MESSAGE = "a silent zero is a wrong weight"


def assemble(blocks, box):
    out = np.zeros([stop - start for start, stop in box], blocks[0][1].dtype)
    for there, array in blocks:
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(there, box)]
        if any(start >= stop for start, stop in common):
            continue
        target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box))
        source = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, there))
        out[target] = array[source]
    return out
