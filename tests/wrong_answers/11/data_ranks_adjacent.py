"""Data-parallel neighbours are adjacent ranks instead of tensor-parallel ones."""

MESSAGE = "must differ in t, the tensor axis"


def place(rank, dp, pp, tp):
    return rank % dp, rank // dp % pp, rank // (dp * pp)
