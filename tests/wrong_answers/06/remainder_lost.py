"""Ranges are n // ranks long, so the last elements belong to nobody."""

MESSAGE = "the remainder must go somewhere"


def flat_pieces(sizes, ranks):
    length, pieces = sum(sizes) // ranks, []
    for rank in range(ranks):
        begin, mine, offset = rank * length, [], 0
        for i, size in enumerate(sizes):
            start, stop = max(begin - offset, 0), min(begin + length - offset, size)
            if start < stop:
                mine.append((i, start, stop))
            offset += size
        pieces.append(mine)
    return pieces
