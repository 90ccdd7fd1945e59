"""Groups are ordered by a key that runs the other way."""

MESSAGE = "the key orders them"


def axes(comm, dp, pp, tp):
    d, p, t = comm.rank // (pp * tp), comm.rank // tp % pp, comm.rank % tp
    return comm.split(p * tp + t, -d), comm.split(d * tp + t, -p), comm.split(d * pp + p, -t)
