"""Every step of the ring is charged for the whole array."""

MESSAGE = "a message of the ring is n/N bytes"


def all_reduce_seconds(n_bytes, ranks, alpha, beta):
    levels, sent = ranks.bit_length() - 1, 2 * (ranks - 1) / ranks * n_bytes
    return {
        "ring": 2 * (ranks - 1) * (alpha + n_bytes * beta),
        "doubling": levels * (alpha + n_bytes * beta),
        "halving_doubling": 2 * levels * alpha + sent * beta,
    }
