"""An axis of one rank is not split off, and the world is returned for it."""

MESSAGE = "Along an axis of length one a rank is alone"


def axes(comm, dp, pp, tp):
    d, p, t = comm.rank // (pp * tp), comm.rank // tp % pp, comm.rank % tp
    return (
        comm.split(p * tp + t, d) if dp > 1 else comm,
        comm.split(d * tp + t, p) if pp > 1 else comm,
        comm.split(d * pp + p, t) if tp > 1 else comm,
    )
