"""Adds in place to arrays that a vjp returned."""

import numpy as np

MESSAGE = "`+=` writes into it, and it may be somebody else's gradient"


def backward(tape, size, output):
    gradients = [None] * size
    gradients[output] = np.ones(())
    for inputs, result, vjp in reversed(tape):
        if gradients[result] is not None:
            for source, g in zip(inputs, vjp(gradients[result])):
                if gradients[source] is None:
                    gradients[source] = g
                else:
                    gradients[source] += g
    return gradients
