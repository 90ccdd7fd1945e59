"""Sums the axes missing in front, not those of length 1."""

MESSAGE = "axes of length 1 are stretched by broadcasting, too"


def unbroadcast(g, shape):
    return g.sum(axis=tuple(range(g.ndim - len(shape))))
