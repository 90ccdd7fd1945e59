"""The remainder goes to the last rank alone."""

from itertools import pairwise

MESSAGE = "lengths differ by one at most"


def flat_pieces(sizes, ranks):
    total = sum(sizes)
    ends = [total // ranks * rank for rank in range(ranks)] + [total]
    pieces = []
    for begin, end in pairwise(ends):
        mine, offset = [], 0
        for i, size in enumerate(sizes):
            start, stop = max(begin - offset, 0), min(end - offset, size)
            if start < stop:
                mine.append((i, start, stop))
            offset += size
        pieces.append(mine)
    return pieces
