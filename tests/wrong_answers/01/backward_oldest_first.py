"""Runs the tape in the order of forward."""

import numpy as np

MESSAGE = "from the newest step to the oldest"


def backward(tape, size, output):
    gradients = [None] * size
    gradients[output] = np.ones(())
    for inputs, result, vjp in tape:
        if gradients[result] is not None:
            for source, g in zip(inputs, vjp(gradients[result])):
                gradients[source] = g if gradients[source] is None else gradients[source] + g
    return gradients
