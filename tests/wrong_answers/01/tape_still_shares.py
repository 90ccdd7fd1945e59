"""The bug hunt as it was."""

import numpy as np

MESSAGE = "Which line may write into an array that it does not own?"


class Tape(Tape):  # noqa: F821 (the reference runs before this file)
    def gradients(self, output):
        gradients = [None] * len(self.values)
        gradients[output] = np.ones_like(self.values[output])
        for inputs, number, vjp in reversed(self.steps):
            if gradients[number] is None:
                continue
            for source, g in zip(inputs, vjp(gradients[number])):
                if gradients[source] is None:
                    gradients[source] = g
                else:
                    gradients[source] += g
        return [np.zeros_like(x) if g is None else g for x, g in zip(self.values, gradients)]
