"""The engine's own grouping is reached through a name for the whole package."""

import minipar as mp

MESSAGE = "minipar.parallel.buckets.make_buckets is not to be used in this exercise"


def assign_buckets(sizes, limit):
    return mp.parallel.buckets.make_buckets(sizes, limit)
