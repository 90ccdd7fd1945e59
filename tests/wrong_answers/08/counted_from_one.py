"""Microbatches are counted from 1."""

MESSAGE = "were expected, from 0 to"


def gpipe(stages, microbatches):
    return [[(kind, i) for kind in "FB" for i in range(1, microbatches + 1)] for _ in range(stages)]
