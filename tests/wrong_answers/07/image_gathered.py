"""The whole image is gathered on every rank for the sake of a few rows."""

import numpy as np

MESSAGE = "a halo goes to the two neighbours"


def convolve_rows(comm, rows, kernel):
    half = len(kernel) // 2
    counts = comm.all_gather(np.array([len(rows)])).tolist()
    start = sum(counts[: comm.rank])
    image = np.pad(comm.all_gather(rows, counts), ((half, half), (0, 0)))
    return sum(kernel[k] * image[start + k : start + k + len(rows)] for k in range(len(kernel)))
