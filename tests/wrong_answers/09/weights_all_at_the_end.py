"""All W's are put off to the end, which holds every activation."""

MESSAGE = "all W's come after the last I"


def zero_bubble(stages, microbatches):
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, microbatches)
        actions = [("F", i) for i in range(warm_up)]
        for i in range(microbatches):
            if warm_up + i < microbatches:
                actions.append(("F", warm_up + i))
            actions.append(("I", i))
        actions += [("W", i) for i in range(microbatches)]
        schedule.append(actions)
    return schedule
