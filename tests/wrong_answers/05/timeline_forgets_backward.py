"""A step ends with its last sum, even if backward takes longer."""

MESSAGE = "the step ends with backward"


def step_seconds(ready, seconds, backward_seconds):
    free = 0.0
    for full, took in zip(ready, seconds):
        free = max(full, free) + took
    end = free
    return end, end - backward_seconds
