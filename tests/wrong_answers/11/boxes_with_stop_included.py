"""The last index is taken for the stop."""

MESSAGE = "stop is not included"


def shard_boxes(shape, dim, groups, ranks, rank):
    block = shape[dim] // groups
    size = block // ranks
    boxes = []
    for group in range(groups):
        start = group * block + rank * size
        box = [(0, n) for n in shape]
        box[dim] = (start, start + size - 1)
        boxes.append(tuple(box))
    return boxes
