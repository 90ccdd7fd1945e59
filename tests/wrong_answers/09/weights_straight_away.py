"""Each W follows its I at once, so nothing is there to fill the bubble."""

MESSAGE = "each W directly follows its I"


def zero_bubble(stages, microbatches):
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, microbatches)
        actions = [("F", i) for i in range(warm_up)]
        for i in range(microbatches):
            if warm_up + i < microbatches:
                actions.append(("F", warm_up + i))
            actions.append(("I", i))
            actions.append(("W", i))
        schedule.append(actions)
    return schedule
