"""A box that one block holds is returned as a view of it."""

import numpy as np

MESSAGE = "returns a view of a stored block"


def assemble(blocks, box):
    for there, array in blocks:
        if all(a <= c and d <= b for (a, b), (c, d) in zip(there, box)):
            return array[tuple(slice(c - a, d - a) for (a, _), (c, d) in zip(there, box))]
    out = np.empty([stop - start for start, stop in box], blocks[0][1].dtype)
    missing = out.size
    for there, array in blocks:
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(there, box)]
        if any(start >= stop for start, stop in common):
            continue
        target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box))
        out[target] = array[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, there))]
        missing -= out[target].size
    if missing:
        raise ValueError(f"{missing} elements are in no block")
    return out
