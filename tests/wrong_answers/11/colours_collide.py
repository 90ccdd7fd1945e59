"""The colour is the sum of the two shared indices, which different groups have in common."""

MESSAGE = "two groups got one colour"


def axes(comm, dp, pp, tp):
    d, p, t = comm.rank // (pp * tp), comm.rank // tp % pp, comm.rank % tp
    return comm.split(p + t, d), comm.split(d + t, p), comm.split(d + p, t)
