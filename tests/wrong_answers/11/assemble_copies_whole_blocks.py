"""The whole block is copied to where only a part of it belongs; NumPy refuses the shapes with a ValueError."""

import numpy as np

MESSAGE = "ValueError (could not broadcast input array from shape (2,8) into shape (2,3))"


def assemble(blocks, box):
    out = np.empty([stop - start for start, stop in box], blocks[0][1].dtype)
    missing = out.size
    for there, array in blocks:
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(there, box)]
        if any(start >= stop for start, stop in common):
            continue
        target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, box))
        out[target] = array
        missing -= out[target].size
    if missing:
        raise ValueError(f"{missing} elements of {box} are in no block")
    return out
