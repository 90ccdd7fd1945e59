"""Every stage gets as many blocks as the others, whatever they cost."""

MESSAGE = "every stage has as many blocks"


def split_stages(costs, stages):
    size, extra = divmod(len(costs), stages)
    found, start = [], 0
    for k in range(stages):
        stop = start + size + (k < extra)
        found.append((start, stop))
        start = stop
    return found
