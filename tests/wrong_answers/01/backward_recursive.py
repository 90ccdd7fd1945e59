"""A recursive topological sort, which ends at Python's recursion limit."""

import numpy as np

MESSAGE = "too deep for recursion"


def backward(tape, size, output):
    made_by = {step[1]: step for step in tape}
    order, seen = [], set()

    def visit(number):
        if number in made_by and number not in seen:
            seen.add(number)
            for source in made_by[number][0]:
                visit(source)
            order.append(made_by[number])

    visit(output)
    gradients = [None] * size
    gradients[output] = np.ones(())
    for inputs, result, vjp in reversed(order):
        for source, g in zip(inputs, vjp(gradients[result])):
            gradients[source] = g if gradients[source] is None else gradients[source] + g
    return gradients
