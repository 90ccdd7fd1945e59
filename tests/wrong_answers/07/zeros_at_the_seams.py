"""Every rank pads its own rows with zeros and asks nobody."""

import numpy as np

MESSAGE = "padding belongs to the border of the whole image only"


def convolve_rows(comm, rows, kernel):
    half = len(kernel) // 2
    image = np.pad(rows, ((half, half), (0, 0)))
    return sum(kernel[k] * image[k : k + len(rows)] for k in range(len(kernel)))
