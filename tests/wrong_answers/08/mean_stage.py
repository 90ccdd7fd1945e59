"""The mean of the stages is taken as the pace."""

MESSAGE = "the others wait for the slowest"


def gpipe_seconds(forward, backward, microbatches, message=0.0):
    p = len(forward)
    return (microbatches + p - 1) / p * (sum(forward) + sum(backward)) + 2 * (p - 1) * message
