"""The vjp returns the local derivative and forgets the gradient that comes in."""

import numpy as np

MESSAGE = "the gradient that comes in, g, multiplies it"


def softplus(x):
    y = np.logaddexp(0, x)
    return y, lambda g: 1 / (1 + np.exp(-x))
