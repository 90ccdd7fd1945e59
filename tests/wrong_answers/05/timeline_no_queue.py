"""Sums run at the same time, as if each had wires of its own."""

MESSAGE = "sums overlap each other there"


def step_seconds(ready, seconds, backward_seconds):
    end = max([backward_seconds, *(full + took for full, took in zip(ready, seconds))])
    return end, end - backward_seconds
