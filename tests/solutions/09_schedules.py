"""Lesson 09: the reference solution."""

import numpy as np

Action = tuple[str, int]


def one_f_one_b(stages: int, microbatches: int) -> list[list[Action]]:
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, microbatches)
        actions = [("F", i) for i in range(warm_up)]
        for i in range(microbatches - warm_up):
            actions += [("F", warm_up + i), ("B", i)]
        actions += [("B", i) for i in range(microbatches - warm_up, microbatches)]
        schedule.append(actions)
    return schedule


def peak_live(schedule: list[list[Action]]) -> list[int]:
    peaks = []
    for actions in schedule:
        live = peak = 0
        for kind, _ in actions:
            if kind == "F":
                live += 1
                peak = max(peak, live)
            elif kind in ("B", "W"):
                live -= 1
        peaks.append(peak)
    return peaks


def simulate(
    schedule: list[list[Action]], costs: dict[str, float], message: float = 0.0
) -> list[list[tuple[float, float]]]:
    price = {**costs, "B": costs["I"] + costs["W"]}
    last = len(schedule) - 1
    made: dict[tuple[str, int, int], float] = {}  # end of forward and backward by (direction, stage, microbatch)
    times: list[list[tuple[float, float]]] = [[] for _ in schedule]
    free = [0.0] * len(schedule)
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule):
            while len(times[stage]) < len(actions):
                kind, i = actions[len(times[stage])]
                needs = []  # (what, seconds until it is here)
                if kind == "F" and stage > 0:
                    needs = [(("forward", stage - 1, i), message)]
                elif kind == "W":
                    needs = [(("backward", stage, i), 0.0)]
                elif kind in ("B", "I"):
                    needs = [(("forward", stage, i), 0.0)]
                    if stage < last:
                        needs.append((("backward", stage + 1, i), message))
                if any(what not in made for what, _ in needs):
                    break
                start = max([free[stage], *(made[what] + travel for what, travel in needs)])
                free[stage] = start + price[kind]
                times[stage].append((start, free[stage]))
                if kind != "W":
                    made["forward" if kind == "F" else "backward", stage, i] = free[stage]
                moved = True
    for stage, actions in enumerate(schedule):
        if len(times[stage]) < len(actions):
            raise ValueError(f"stage {stage} waits for ever at {actions[len(times[stage])]}")
    return times


def zero_bubble(stages: int, microbatches: int) -> list[list[Action]]:
    schedule = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, microbatches)
        actions = [("F", i) for i in range(warm_up)]
        for i in range(microbatches):
            if warm_up + i < microbatches:
                actions.append(("F", warm_up + i))
            actions.append(("I", i))
            if i >= stage:
                actions.append(("W", i - stage))
        actions += [("W", i) for i in range(max(microbatches - stage, 0), microbatches)]
        schedule.append(actions)
    return schedule


def run_stage(comm, actions, weight, inputs, targets):
    first, last = comm.rank == 0, comm.rank == comm.size - 1
    gradient = np.zeros_like(weight)
    kept, sent = {}, []
    for kind, i in actions:
        if kind == "F":
            x = inputs[i] if first else comm.recv(comm.rank - 1, tag=i)  # fresh memory: backward reads it later
            y = np.tanh(x @ weight)
            kept[i] = x, y
            if not last:
                sent.append(comm.isend(y, comm.rank + 1, tag=i))
        else:
            x, y = kept.pop(i)
            g = y - targets[i] if last else comm.recv(comm.rank + 1, tag=i)
            g = g * (1 - y * y)
            gradient += x.T @ g
            if not first:
                sent.append(comm.isend(g @ weight.T, comm.rank - 1, tag=i))
    for work in sent:
        work.wait()
    return gradient
