"""A fused weight is cut as if it were one block."""

MESSAGE = "cut each block by itself"


def shard_boxes(shape, dim, groups, ranks, rank):
    size = shape[dim] // ranks
    box = [(0, n) for n in shape]
    box[dim] = (rank * size, (rank + 1) * size)
    return [tuple(box)]
