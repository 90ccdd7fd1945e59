"""start and stop are positions on the whole line instead of within the parameter."""

from minipar.comm import balanced

MESSAGE = "counted within the parameter, not along the line"


def flat_pieces(sizes, ranks):
    pieces, begin = [], 0
    for count in balanced(sum(sizes), ranks):
        mine, offset = [], 0
        for i, size in enumerate(sizes):
            start, stop = max(begin, offset), min(begin + count, offset + size)
            if start < stop:
                mine.append((i, start, stop))
            offset += size
        pieces.append(mine)
        begin += count
    return pieces
