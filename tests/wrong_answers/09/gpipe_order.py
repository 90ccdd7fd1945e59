"""All forwards run before the first backward."""

MESSAGE = "is GPipe's order"


def one_f_one_b(stages, microbatches):
    return [[(kind, i) for kind in "FB" for i in range(microbatches)] for _ in range(stages)]
