"""Only the busy time of the slowest stage is counted."""

MESSAGE = "counts the busy time of one stage"


def gpipe_seconds(forward, backward, microbatches, message=0.0):
    return microbatches * (max(forward) + max(backward)) + 2 * (len(forward) - 1) * message
