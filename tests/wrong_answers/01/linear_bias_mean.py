"""The gradient by bias averaged over the batch."""

MESSAGE = "the gradient by bias is averaged over the batch"


def linear(x, weight, bias):
    return x @ weight.T + bias, lambda g: (g @ weight, g.T @ x, g.mean(axis=0))
