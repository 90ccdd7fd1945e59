"""stop is taken as the last block of the stage, so a block between two stages belongs to none."""

from itertools import combinations

MESSAGE = "without gap or overlap"


def split_stages(costs, stages):
    def ends(cut):
        return list(zip([0, *cut], [*cut, len(costs)], strict=True))

    cuts = combinations(range(1, len(costs)), stages - 1)
    best = min((ends(cut) for cut in cuts), key=lambda found: max(sum(costs[a:b]) for a, b in found))
    return [(start, stop - 1) if stop - start > 1 else (start, stop) for start, stop in best]
