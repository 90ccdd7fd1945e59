"""Samples are dealt out like cards."""

MESSAGE = "give the slice a start and a stop"


def shard(samples, rank, ranks):
    return slice(rank, None, ranks)
