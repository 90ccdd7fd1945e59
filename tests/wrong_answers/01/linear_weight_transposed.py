"""The gradient by weight in the shape of its transpose."""

MESSAGE = "a gradient has the shape of what it is the gradient by"


def linear(x, weight, bias):
    return x @ weight.T + bias, lambda g: (g @ weight, x.T @ g, g.sum(axis=0))
