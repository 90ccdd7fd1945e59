"""The mended function is imported, within another one."""

MESSAGE = "minipar.comm.collectives.doubling_all_reduce is not to be used in this exercise"


def doubling_all_reduce(comm, x):
    from minipar.comm.collectives import doubling_all_reduce as mended

    return mended(comm, x)
