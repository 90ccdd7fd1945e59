"""An array of float64 ones turns float32 into float64."""

import numpy as np

MESSAGE = "is float64 for x of float32"


def softplus(x):
    one = np.ones(x.shape)
    small = np.exp(-np.abs(x))
    return np.maximum(x, 0) + np.log1p(small), lambda g: g * np.where(x >= 0, one, small) / (one + small)
