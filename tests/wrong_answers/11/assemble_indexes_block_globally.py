"""The block is indexed with places in the whole weight."""

import numpy as np

MESSAGE = "counts from where the *block*"


def assemble(blocks, box):
    out = np.zeros([stop - start for start, stop in box], blocks[0][1].dtype)
    found = False
    for there, array in blocks:
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(there, box)]
        if any(start >= stop for start, stop in common):
            continue
        target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box))
        part = array[tuple(slice(a, b) for a, b in common)]
        out[target][tuple(slice(0, n) for n in part.shape)] = part
        found = True
    if not found:
        raise ValueError("nothing of the box is stored")
    return out
