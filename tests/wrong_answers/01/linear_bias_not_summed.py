"""The gradient by bias keeps the batch axis."""

MESSAGE = "the gradient by bias still has the batch in it"


def linear(x, weight, bias):
    return x @ weight.T + bias, lambda g: (g @ weight, g.T @ x, g)
