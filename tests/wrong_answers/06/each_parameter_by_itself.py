"""Every parameter is cut over all ranks by itself, instead of the whole line."""

from minipar.comm import balanced

MESSAGE = "not each parameter by itself"


def flat_pieces(sizes, ranks):
    pieces = [[] for _ in range(ranks)]
    for i, size in enumerate(sizes):
        start = 0
        for rank, count in enumerate(balanced(size, ranks)):
            if count:
                pieces[rank].append((i, start, start + count))
            start += count
    return pieces
