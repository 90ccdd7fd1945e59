"""Buckets from the start of the model: the first is full last."""

MESSAGE = "Backward reaches the last layer first"


def assign_buckets(sizes, limit):
    buckets, total = [], 0
    for i in range(len(sizes)):
        if buckets and total + sizes[i] <= limit:
            buckets[-1].append(i)
            total += sizes[i]
        else:
            buckets.append([i])
            total = sizes[i]
    return buckets
