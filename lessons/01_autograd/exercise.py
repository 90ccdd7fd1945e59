"""Exercise 1: reverse-mode differentiation, from one formula to a tape.

Write the four functions, then find the bug in `Tape`. Plain NumPy; nothing of minipar is needed. The words
are those of the walkthrough: a *vjp* takes the gradient of the loss by an output, and returns the gradients of
the loss by the inputs.

Judge it with `minipar grade 01 --file exercise.py`.
"""

import numpy as np


def softplus(x):
    """Return log(1 + exp(x)), elementwise, and its vjp.

    Args:
        x: an array of any shape, float32 or float64, values up to ±10,000.

    Returns:
        (y, vjp): y has the shape and dtype of `x`. `vjp(g)` takes the gradient by y (same shape and dtype)
        and returns the gradient by x (same shape and dtype).

    Contract:
        - No infinity, NaN or warning of NumPy for any finite x, in y or in the gradient: for x = 10,000
          softplus is 10,000, for x = -10,000 it is 0.
        - float32 stays float32.
    """
    raise NotImplementedError("softplus: the value first; then d softplus / dx, times g")


def unbroadcast(g, shape):
    """Return the gradient by an array of `shape` that NumPy has broadcast to the shape of `g`.

    When a + b stretches b of shape (3, 1) to (2, 3, 4), each element of b is used 8 times, and the gradient by
    it is collected from all 8 uses.

    Args:
        g: an array; `shape` broadcasts to g.shape.
        shape: a tuple, with as many axes as g or fewer.

    Returns:
        An array of exactly `shape`.
    """
    raise NotImplementedError("unbroadcast: axes that were added in front, and axes of length 1")


def linear(x, weight, bias):
    """Return x @ weight.T + bias and its vjp.

    Args:
        x: (B, I).
        weight: (O, I).
        bias: (O,).

    Returns:
        (y, vjp): y is (B, O). `vjp(g)` with g (B, O) returns the tuple of gradients by x (B, I), by weight
        (O, I) and by bias (O,).
    """
    raise NotImplementedError("linear: the shapes leave little choice; which product gives (O, I)?")


def backward(tape, size, output):
    """Return the gradient of one value by every other: the loop that runs a tape backwards.

    Values are numbered in the order in which they came about. `tape` holds one step (inputs, output, vjp) an
    operation, oldest first: `inputs` is a tuple of value numbers, `output` is a value number, greater than
    all of `inputs`, and `vjp(g)` takes the gradient by the output and returns a tuple with one gradient for
    each input. The same value may be an input twice: h + h has inputs (5, 5).

    Args:
        tape: list of (inputs, output, vjp).
        size: how many values there are.
        output: number of the value to differentiate, a scalar; the gradient by itself is np.ones(()).

    Returns:
        A list of `size`: the gradient by each value, an array; None for a value that the output does not
        depend on.

    Contract:
        - A vjp is called once, and not at all if the output does not depend on its step.
        - An array that a vjp returned or was given is never changed: it may be somebody else's.
        - A tape of 5,000 steps takes a fraction of a second.
    """
    raise NotImplementedError("backward: newest step first; a value used twice gets two gradients")


class Tape:
    """THE BUG HUNT: values with a tape, complete, and wrong in one line. Find it and mend it.

        tape = Tape()
        a, b = tape.value([2.0, 1.0]), tape.value([3.0, 4.0])
        square = tape.multiply(a, a)
        product = tape.multiply(square, tape.add(a, b))     # a² (a + b)
        gradients = tape.gradients(product)                 # a list by value number

    gradients[a] is 3 a² + 2 a b, as it should be; gradients[b] should be a² and is not. With numbers in the
    place of arrays both are right, and so are the gradients of (a + b) * a². What is different there?
    """

    def __init__(self):
        self.values = []
        self.steps = []

    def value(self, x):
        """Enter an input (a number or an array) and return its number."""
        self.values.append(np.array(x, dtype=np.float64))
        return len(self.values) - 1

    def add(self, a, b):
        """Return the number of value a + value b, of the same shape."""
        return self._record((a, b), self.values[a] + self.values[b], lambda g: (g, g))

    def multiply(self, a, b):
        """Return the number of value a * value b, of the same shape."""
        x, y = self.values[a], self.values[b]
        return self._record((a, b), x * y, lambda g: (g * y, g * x))

    def _record(self, inputs, y, vjp):
        number = self.value(y)
        self.steps.append((inputs, number, vjp))
        return number

    def gradients(self, output):
        """Return the gradient of the sum of value `output` by every value, a list; zeros where it is none."""
        gradients = [None] * len(self.values)
        gradients[output] = np.ones_like(self.values[output])
        for inputs, number, vjp in reversed(self.steps):
            if gradients[number] is None:
                continue
            for source, g in zip(inputs, vjp(gradients[number])):
                if gradients[source] is None:
                    gradients[source] = g
                else:
                    gradients[source] += g  # in place: no new array for each use
        return [np.zeros_like(x) if g is None else g for x, g in zip(self.values, gradients)]
