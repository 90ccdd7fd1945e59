"""The formula as it stands: exp(x) overflows at 1e4."""

import numpy as np

MESSAGE = "overflows: exp(x) leaves the range"


def softplus(x):
    return np.log(1 + np.exp(x)), lambda g: g / (1 + np.exp(-x))
