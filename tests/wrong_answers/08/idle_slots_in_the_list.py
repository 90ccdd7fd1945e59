"""Stage s skips its first s forwards, as if the idle time of filling were part of the list."""

MESSAGE = "missing: F3"


def gpipe(stages, microbatches):
    return [
        [("F", i - s) for i in range(s, microbatches)] + [("B", i) for i in range(microbatches)]
        for s in range(stages)
    ]
