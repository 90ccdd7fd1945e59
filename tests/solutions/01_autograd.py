"""Reference solution of exercise 1."""

import numpy as np


def softplus(x):
    y = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))

    def vjp(g):
        small = np.exp(-np.abs(x))  # between 0 and 1: cannot overflow
        slope = np.where(x >= 0, 1, small) / (1 + small)  # the logistic function
        return g * slope

    return y, vjp


def unbroadcast(g, shape):
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1)
    return g.sum(axis=stretched, keepdims=True)


def linear(x, weight, bias):
    return x @ weight.T + bias, lambda g: (g @ weight, g.T @ x, g.sum(axis=0))


def backward(tape, size, output):
    gradients = [None] * size
    gradients[output] = np.ones(())
    for inputs, result, vjp in reversed(tape):
        if gradients[result] is None:
            continue
        for source, g in zip(inputs, vjp(gradients[result])):
            gradients[source] = g if gradients[source] is None else gradients[source] + g
    return gradients


class Tape:
    def __init__(self):
        self.values = []
        self.steps = []

    def value(self, x):
        self.values.append(np.array(x, dtype=np.float64))
        return len(self.values) - 1

    def add(self, a, b):
        return self._record((a, b), self.values[a] + self.values[b], lambda g: (g, g))

    def multiply(self, a, b):
        x, y = self.values[a], self.values[b]
        return self._record((a, b), x * y, lambda g: (g * y, g * x))

    def _record(self, inputs, y, vjp):
        number = self.value(y)
        self.steps.append((inputs, number, vjp))
        return number

    def gradients(self, output):
        gradients = [None] * len(self.values)
        gradients[output] = np.ones_like(self.values[output])
        for inputs, number, vjp in reversed(self.steps):
            if gradients[number] is None:
                continue
            for source, g in zip(inputs, vjp(gradients[number])):
                gradients[source] = g if gradients[source] is None else gradients[source] + g
        return [np.zeros_like(x) if g is None else g for x, g in zip(self.values, gradients)]
