"""Devices that get no parameter are left out of the result."""

MESSAGE = "empty ones too"


def place_by_bytes(sizes, devices):
    held, placed = [0] * devices, [[] for _ in range(devices)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        device = held.index(min(held))
        held[device] += sizes[i]
        placed[device].append(i)
    return [sorted(indices) for indices in placed if indices]
