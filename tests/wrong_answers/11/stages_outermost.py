"""The pipeline is the outermost axis, data the middle one."""

MESSAGE = "from rank to rank first t, then p, then d"


def place(rank, dp, pp, tp):
    return rank // tp % dp, rank // (dp * tp), rank % tp
