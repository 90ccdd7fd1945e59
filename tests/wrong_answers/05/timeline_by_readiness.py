"""Buckets are sent as they become full."""

MESSAGE = "They go in the order of the list"


def step_seconds(ready, seconds, backward_seconds):
    free = 0.0
    for full, took in sorted(zip(ready, seconds)):
        free = max(full, free) + took
    end = max(backward_seconds, free)
    return end, end - backward_seconds
