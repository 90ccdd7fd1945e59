"""The ring is counted once around: only the reduce-scatter."""

MESSAGE = "has two halves, reduce and gather"


def all_reduce_seconds(n_bytes, ranks, alpha, beta):
    levels, sent = ranks.bit_length() - 1, (ranks - 1) / ranks * n_bytes
    return {
        "ring": (ranks - 1) * alpha + sent * beta,
        "doubling": levels * (alpha + n_bytes * beta),
        "halving_doubling": 2 * levels * alpha + 2 * sent * beta,
    }
