"""Parameters are placed in the model's order instead of the largest first."""

MESSAGE = "take the largest first"


def place_by_bytes(sizes, devices):
    held, placed = [0] * devices, [[] for _ in range(devices)]
    for i, size in enumerate(sizes):
        device = held.index(min(held))
        held[device] += size
        placed[device].append(i)
    return placed
