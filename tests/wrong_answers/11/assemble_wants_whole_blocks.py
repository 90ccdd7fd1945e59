"""Only blocks that lie wholly inside the box are used."""

import numpy as np

MESSAGE = "though every element is stored"


def assemble(blocks, box):
    out = np.empty([stop - start for start, stop in box], blocks[0][1].dtype)
    missing = out.size
    for there, array in blocks:
        if all(c <= a and b <= d for (a, b), (c, d) in zip(there, box)):
            out[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(there, box))] = array
            missing -= array.size
    if missing:
        raise ValueError(f"{missing} elements are in no block")
    return out
