"""Every stage puts W off by p - 1 microbatches, the first one too, which has no room."""

MESSAGE = "its W's are put off too far"


def zero_bubble(stages, microbatches):
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, microbatches)
        actions = [("F", i) for i in range(warm_up)]
        for i in range(microbatches):
            if warm_up + i < microbatches:
                actions.append(("F", warm_up + i))
            actions.append(("I", i))
            if i >= stages - 1:
                actions.append(("W", i - stages + 1))
        actions += [("W", i) for i in range(max(microbatches - stages + 1, 0), microbatches)]
        schedule.append(actions)
    return schedule
