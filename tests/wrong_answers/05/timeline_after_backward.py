"""All sums begin after backward."""

MESSAGE = "they run beside it"


def step_seconds(ready, seconds, backward_seconds):
    end = backward_seconds + sum(seconds)
    return end, end - backward_seconds
