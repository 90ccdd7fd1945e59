"""Only the last stage runs its backwards in descending order."""

MESSAGE = "take the microbatches in different orders"


def gpipe(stages, microbatches):
    up = [(kind, i) for kind in "FB" for i in range(microbatches)]
    down = up[:microbatches] + up[microbatches:][::-1]
    return [up] * (stages - 1) + [down]
