"""Every stage warms up with as many forwards as stage 0."""

MESSAGE = "every stage warms up like stage 0"


def one_f_one_b(stages, microbatches):
    schedule = []
    for _ in range(stages):
        warm_up = min(stages - 1, microbatches)
        actions = [("F", i) for i in range(warm_up)]
        for i in range(microbatches - warm_up):
            actions += [("F", warm_up + i), ("B", i)]
        actions += [("B", i) for i in range(microbatches - warm_up, microbatches)]
        schedule.append(actions)
    return schedule
