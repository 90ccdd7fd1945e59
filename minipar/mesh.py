"""The mesh: ranks arranged in a grid of data-, pipeline- and tensor-parallel axes.

    Mesh(world, dp=2, pp=1, tp=2)          tp 0    tp 1
                                    dp 0   rank 0  rank 1
                                    dp 1   rank 2  rank 3

Tensor-parallel neighbours are adjacent ranks, because they exchange the most and adjacent ranks usually
share a node (Narayanan et al. 2021, section 3.2). Pipeline stages come next and data-parallel ranks are the
farthest apart: an order of minipar's own, Megatron-LM puts the stages farthest apart.
"""

from __future__ import annotations

from minipar.comm.interface import Communicator
from minipar.errors import UsageError

AXES = ("dp", "pp", "tp")


def factorings(n: int, axes: int = 3) -> list[tuple[int, ...]]:
    """Return every way to write n as an ordered product of `axes` positive integers."""
    if axes == 1:
        return [(n,)]
    return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in factorings(n // d, axes - 1)]


class Mesh:
    """A communicator for each axis, and this rank's place on it.

    Args:
        world: all ranks.
        dp, pp, tp: ranks along each axis; one of them may be None and is what the others leave.

    Attributes:
        dp, pp, tp: the communicator of the ranks that differ from this one along that axis only.
        shape: {"dp": …, "pp": …, "tp": …}.
        place: this rank's index along each axis.

    Raises:
        UsageError: the sizes do not multiply to the number of ranks; names sizes that would.
    """

    dp: Communicator
    pp: Communicator
    tp: Communicator

    def __init__(self, world: Communicator, dp: int | None = None, pp: int | None = 1, tp: int | None = 1):
        self.world = world
        self.shape = resolve(world.size, dp, pp, tp)
        self.place = {}
        stride = world.size
        for axis in AXES:
            stride //= self.shape[axis]
            self.place[axis] = world.rank // stride % self.shape[axis]
        for axis in AXES:
            others = [self.place[a] for a in AXES if a != axis]
            sizes = [self.shape[a] for a in AXES if a != axis]
            group = world.split(others[0] * sizes[1] + others[1], key=self.place[axis], name=axis)
            assert group is not None
            setattr(self, axis, group)

    def __str__(self) -> str:
        """Return the grid: a block a pipeline stage, a row a replica, a column a tensor-parallel rank."""
        dp, pp, tp = (self.shape[a] for a in AXES)
        width = max(len(f"rank {self.world.size - 1}"), len(f"tp {tp - 1}"))
        lines = [f"mesh of {self.world.size} ranks: dp {dp} × pp {pp} × tp {tp}"]
        for stage in range(pp):
            head = f"pp {stage}" if pp > 1 else ""
            lines.append(f"{head:<6}" + "  ".join(f"{f'tp {t}':<{width}}" for t in range(tp)))
            for replica in range(dp):
                ranks = [(replica * pp + stage) * tp + t for t in range(tp)]
                lines.append(f"dp {replica:<3}" + "  ".join(f"{f'rank {r}':<{width}}" for r in ranks))
        return "\n".join(line.rstrip() for line in lines)


def resolve(ranks: int, dp: int | None, pp: int | None, tp: int | None) -> dict[str, int]:
    """Return the size of each axis, the one given as None being what the others leave.

    Raises:
        UsageError: a size below 1, or sizes that do not multiply to `ranks`.
    """
    given = {"dp": dp, "pp": pp, "tp": tp}
    for axis, size in given.items():
        if size is not None and size < 1:
            raise UsageError(f"mesh: {axis} = {size} must be at least 1")
    known = 1
    for size in given.values():
        known *= size or 1
    free = [axis for axis, size in given.items() if size is None]
    if len(free) > 1:
        raise UsageError(f"mesh: only one of dp, pp, tp can be left open, not {' and '.join(free)}")
    if (free and ranks % known) or (not free and known != ranks):
        wanted = " × ".join(f"{axis} {size}" for axis, size in given.items() if size is not None)
        fits = _nearest(ranks, given)
        raise UsageError(f"mesh: {wanted} = {known} does not fit {ranks} ranks; for example {fits} would")
    return {axis: size if size is not None else ranks // known for axis, size in given.items()}


def _nearest(ranks: int, given: dict[str, int | None]) -> str:
    """Return the factoring of `ranks` that changes the given sizes least, as options."""
    wanted = list(given.values())
    best = min(factorings(ranks), key=lambda f: (sum(b not in (a, None) for a, b in zip(f, wanted)), -f[0]))
    return " ".join(f"--{axis} {size}" for axis, size in zip(AXES, best))
