"""Every stage alternates from the start, so only one stage works at a time."""

MESSAGE = "forwards that fit, and then it idles"


def one_f_one_b(stages, microbatches):
    return [[(kind, i) for i in range(microbatches) for kind in "FB"] for _ in range(stages)]
