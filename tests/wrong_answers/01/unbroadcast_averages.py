"""The mean of the uses in place of their sum."""

MESSAGE = "the uses were averaged"


def unbroadcast(g, shape):
    g = g.mean(axis=tuple(range(g.ndim - len(shape)))) if g.ndim > len(shape) else g
    ones = tuple(i for i, n in enumerate(shape) if n == 1)
    return g.mean(axis=ones, keepdims=True) if ones else g
