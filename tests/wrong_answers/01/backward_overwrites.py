"""The gradient of a value used twice is that of the last use."""

import numpy as np

MESSAGE = "keeps only one of its gradients"


def backward(tape, size, output):
    gradients = [None] * size
    gradients[output] = np.ones(())
    for inputs, result, vjp in reversed(tape):
        if gradients[result] is not None:
            for source, g in zip(inputs, vjp(gradients[result])):
                gradients[source] = g
    return gradients
