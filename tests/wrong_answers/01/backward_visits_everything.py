"""Starts all gradients at zero, so every vjp runs and nothing is ever None."""

import numpy as np

MESSAGE = "have no part in the output"


def backward(tape, size, output):
    gradients = [np.zeros(()) for _ in range(size)]
    gradients[output] = np.ones(())
    for inputs, result, vjp in reversed(tape):
        for source, g in zip(inputs, vjp(gradients[result])):
            gradients[source] = gradients[source] + g
    return gradients
