"""A bucket is closed only after it has passed the limit."""

MESSAGE = "the limit is 4"


def assign_buckets(sizes, limit):
    buckets, total = [], 0
    for i in reversed(range(len(sizes))):
        if buckets and total <= limit:
            buckets[-1].append(i)
            total += sizes[i]
        else:
            buckets.append([i])
            total = sizes[i]
    return buckets
