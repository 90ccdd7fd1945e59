"""Stages are filled one after the other up to the average; the last one gets what is left."""

MESSAGE = "Filling stages one by one"


def split_stages(costs, stages):
    average = sum(costs) / stages
    found, start, total = [], 0, 0
    for i, cost in enumerate(costs):
        total += cost
        left = stages - len(found) - 1
        if left and (total >= average or len(costs) - i - 1 == left):
            found.append((start, i + 1))
            start, total = i + 1, 0
    return [*found, (start, len(costs))]
