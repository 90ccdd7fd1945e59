"""The warm-up is not cut off at the number of microbatches."""

MESSAGE = "is the warm-up cut off at that?"


def one_f_one_b(stages, microbatches):
    schedule = []
    for stage in range(stages):
        warm_up = stages - stage - 1
        actions = [("F", i) for i in range(warm_up)]
        for i in range(microbatches - warm_up):
            actions += [("F", warm_up + i), ("B", i)]
        actions += [("B", i) for i in range(max(microbatches - warm_up, 0), microbatches)]
        schedule.append(actions)
    return schedule
