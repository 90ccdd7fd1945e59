"""Follows every path from the output by itself: right for chains, exponential where values are shared."""

import numpy as np

MESSAGE = "still running after 3 s"


def backward(tape, size, output):
    gradients = [None] * size
    made_by = {result: (inputs, vjp) for inputs, result, vjp in tape}
    paths = [(output, np.ones(()))]
    while paths:
        number, g = paths.pop()
        gradients[number] = g if gradients[number] is None else gradients[number] + g
        if number in made_by:
            inputs, vjp = made_by[number]
            paths += zip(inputs, vjp(g))
    return gradients
