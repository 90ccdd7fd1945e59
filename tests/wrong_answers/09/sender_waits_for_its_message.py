"""A stage stands still until its message has arrived."""

MESSAGE = "a stage stands still while its message travels"


def simulate(schedule, costs, message=0.0):
    price = {**costs, "B": costs["I"] + costs["W"]}
    last, made = len(schedule) - 1, {}
    times, free = [[] for _ in schedule], [0.0] * len(schedule)
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule):
            while len(times[stage]) < len(actions):
                kind, i = actions[len(times[stage])]
                needs = []
                if kind == "F" and stage > 0:
                    needs = [("forward", stage - 1, i)]
                elif kind == "W":
                    needs = [("backward", stage, i)]
                elif kind in ("B", "I"):
                    needs = [("forward", stage, i)]
                    if stage < last:
                        needs.append(("backward", stage + 1, i))
                if any(n not in made for n in needs):
                    break
                start = max([free[stage], *(made[n] + message * (n[1] != stage) for n in needs)])
                end = start + price[kind]
                times[stage].append((start, end))
                free[stage] = end + message * ((kind == "F" and stage < last) or (kind in "BI" and stage > 0))
                if kind != "W":
                    made["forward" if kind == "F" else "backward", stage, i] = end
                moved = True
    if any(len(t) < len(a) for t, a in zip(times, schedule)):
        raise ValueError("a stage waits for ever")
    return times
