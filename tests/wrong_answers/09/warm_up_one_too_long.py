"""The warm-up is p - s forwards: one too many, since the alternation begins with a forward."""

MESSAGE = "its warm-up is too long"


def one_f_one_b(stages, microbatches):
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - stage, microbatches)
        actions = [("F", i) for i in range(warm_up)]
        for i in range(microbatches - warm_up):
            actions += [("F", warm_up + i), ("B", i)]
        actions += [("B", i) for i in range(microbatches - warm_up, microbatches)]
        schedule.append(actions)
    return schedule
