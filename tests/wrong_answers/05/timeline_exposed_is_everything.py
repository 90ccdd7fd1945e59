"""All communication is called exposed."""

MESSAGE = "exposed is what comes after backward"


def step_seconds(ready, seconds, backward_seconds):
    free = 0.0
    for full, took in zip(ready, seconds):
        free = max(full, free) + took
    end = max(backward_seconds, free)
    return end, sum(seconds)
