"""The last rank gets the whole remainder."""

MESSAGE = "The slowest rank decides how long a step takes"


def shard(samples, rank, ranks):
    size = samples // ranks
    return slice(rank * size, samples if rank == ranks - 1 else (rank + 1) * size)
