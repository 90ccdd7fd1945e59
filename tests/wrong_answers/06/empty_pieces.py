"""Pieces without elements are listed."""

from minipar.comm import balanced

MESSAGE = "leave out what a rank owns nothing of"


def flat_pieces(sizes, ranks):
    pieces, begin = [], 0
    for count in balanced(sum(sizes), ranks):
        mine, offset = [], 0
        for i, size in enumerate(sizes):
            start, stop = max(begin - offset, 0), min(begin + count - offset, size)
            if start <= stop:
                mine.append((i, start, stop))
            offset += size
        pieces.append(mine)
        begin += count
    return pieces
