"""Sums the stretched axes away instead of keeping them at length 1."""

MESSAGE = "sum with keepdims=True there"


def unbroadcast(g, shape):
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1))
