"""Parameters larger than the limit are left out."""

MESSAGE = "gets a bucket of its own"


def assign_buckets(sizes, limit):
    buckets, total = [], 0
    for i in reversed(range(len(sizes))):
        if sizes[i] > limit:
            continue
        if buckets and total + sizes[i] <= limit:
            buckets[-1].append(i)
            total += sizes[i]
        else:
            buckets.append([i])
            total = sizes[i]
    return buckets
