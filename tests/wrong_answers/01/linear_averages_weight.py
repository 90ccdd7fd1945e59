"""The gradient by weight divided by the batch size."""

MESSAGE = "it was divided by B, but the loss alone decides about a mean"


def linear(x, weight, bias):
    return x @ weight.T + bias, lambda g: (g @ weight, g.T @ x / len(x), g.sum(axis=0))
