"""The bug hunt mended by a copy in place of an addition."""

import numpy as np

MESSAGE = "a gradient from a second use adds to the first"


class Tape(Tape):  # noqa: F821 (the reference runs before this file)
    def gradients(self, output):
        gradients = [np.zeros_like(x) for x in self.values]
        gradients[output] = np.ones_like(self.values[output])
        for inputs, number, vjp in reversed(self.steps):
            for source, g in zip(inputs, vjp(gradients[number])):
                gradients[source] = g.copy()
        return gradients
