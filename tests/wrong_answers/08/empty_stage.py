"""The cut minimises the largest sum and lets stages be empty."""

from itertools import combinations_with_replacement, pairwise

MESSAGE = "a stage without blocks"


def split_stages(costs, stages):
    def largest(cut):
        ends = [0, *cut, len(costs)]
        return max(sum(costs[a:b]) for a, b in pairwise(ends))

    cut = min(combinations_with_replacement(range(len(costs) + 1), stages - 1), key=largest)
    ends = [0, *cut, len(costs)]
    return list(pairwise(ends))
