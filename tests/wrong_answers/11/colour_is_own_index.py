"""The colour is the index along the axis, so a group are the ranks that share it."""

MESSAGE = "those that *differ* in it"


def axes(comm, dp, pp, tp):
    d, p, t = comm.rank // (pp * tp), comm.rank // tp % pp, comm.rank % tp
    return comm.split(d, comm.rank), comm.split(p, comm.rank), comm.split(t, comm.rank)
