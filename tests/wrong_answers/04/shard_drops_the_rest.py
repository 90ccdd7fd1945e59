"""Equal shares only: the remainder is nobody's."""

MESSAGE = "nobody works on sample"


def shard(samples, rank, ranks):
    size = samples // ranks
    return slice(rank * size, (rank + 1) * size)
