"""The messages of the backward direction are forgotten."""

MESSAGE = "gradients travel back as well"


def gpipe_seconds(forward, backward, microbatches, message=0.0):
    busy = sum(sum(c) + (microbatches - 1) * max(c) for c in (forward, backward))
    return busy + (len(forward) - 1) * message
