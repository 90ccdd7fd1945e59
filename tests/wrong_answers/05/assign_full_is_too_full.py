"""A bucket may not be exactly full."""

MESSAGE = "a bucket is closed only when the next parameter would take it above"


def assign_buckets(sizes, limit):
    buckets, total = [], 0
    for i in reversed(range(len(sizes))):
        if buckets and total + sizes[i] < limit:
            buckets[-1].append(i)
            total += sizes[i]
        else:
            buckets.append([i])
            total = sizes[i]
    return buckets
