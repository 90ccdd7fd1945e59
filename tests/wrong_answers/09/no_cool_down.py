"""The backwards that are left after the last forward are forgotten."""

MESSAGE = "are the last ones drained?"


def one_f_one_b(stages, microbatches):
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, microbatches)
        actions = [("F", i) for i in range(warm_up)]
        for i in range(microbatches - warm_up):
            actions += [("F", warm_up + i), ("B", i)]
        schedule.append(actions)
    return schedule
