"""Every device gets as many parameters as the others, whatever their sizes."""

MESSAGE = "not by their bytes"


def place_by_bytes(sizes, devices):
    placed = [[] for _ in range(devices)]
    for turn, i in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        placed[turn % devices].append(i)
    return [sorted(indices) for indices in placed]
