"""np.where with a branch that overflows where it is not taken."""

import numpy as np

MESSAGE = "NumPy warns on the way"


def softplus(x):
    y = np.where(x > 20, x, np.log1p(np.exp(x)))
    return y, lambda g: g * np.where(x > 0, 1 / (1 + np.exp(-np.abs(x))), 1 - 1 / (1 + np.exp(-np.abs(x))))
