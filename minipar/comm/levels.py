"""A network of two levels: links inside a node, and slower ones between nodes.

    Levels(node=Clock(1e-5, 1e-10), cluster=Clock(1e-3, 1e-8), node_ranks=2).message(0, 1, n_bytes)

Ranks of the world are numbered node by node, as launchers number them unless they are told otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minipar.comm.clock import Clock
from minipar.errors import UsageError


def two_levels(operation: str, n_bytes: float, ranks: int, nodes: int, node: Clock, cluster: Clock) -> float:
    """Return the seconds of a collective on `ranks` (k) of each of `nodes` (M) nodes; n as in `Clock.collective`.

    Every rank has its own way out of the node, as GPU servers with a network card for each GPU have, so the k ranks
    of a node reach those of the same place in the other nodes all at once:

        all_reduce          reduce_scatter of n within, all_reduce of n/k between, all_gather of n within
        reduce_scatter      itself, of n within and n/k between; all_gather the other way round
        broadcast, reduce   in k parts, n/k each between, cut and joined within; or n whole on both levels
        all_to_all          of n within, which brings all for one place of any node there, and of n between
        gather, scatter     n a rank between, with the root's node, and M n a rank within it
        barrier and others  itself on both levels

    All-reduce is that of Cho et al. 2019 ("BlueConnect"), the others follow its pattern.
    """
    if nodes == 1:
        return node.collective(operation, n_bytes, ranks)
    if ranks == 1:
        return cluster.collective(operation, n_bytes, nodes)

    def both(within: float, between: float) -> float:
        return node.collective(operation, within, ranks) + cluster.collective(operation, between, nodes)

    part = n_bytes / ranks
    if operation == "all_reduce":
        within = 2 * node.collective("reduce_scatter", n_bytes, ranks)
        return within + cluster.collective(operation, part, nodes)
    if operation in ("broadcast", "reduce"):
        within = node.collective("scatter", part, ranks) + node.collective("all_gather", n_bytes, ranks)
        return min(both(n_bytes, n_bytes), within + cluster.collective(operation, part, nodes))
    if operation in ("gather", "scatter"):
        return both(nodes * n_bytes, n_bytes)
    return both(n_bytes, n_bytes if operation == "all_to_all" else part)


@dataclass(frozen=True)
class Levels:
    """What is between the ranks of nodes with `node_ranks` ranks each."""

    node: Clock
    cluster: Clock
    node_ranks: int

    def __post_init__(self) -> None:
        if self.node_ranks < 1:
            raise UsageError(f"a node of {self.node_ranks} ranks cannot be; give at least 1")

    def message(self, here: int, there: int, n_bytes: float) -> float:
        """Return the seconds of a message between two ranks of the world."""
        alike = here // self.node_ranks == there // self.node_ranks
        return (self.node if alike else self.cluster).message(n_bytes)

    def collective(self, operation: str, n_bytes: float, members: Sequence[int]) -> float:
        """Return the seconds of a collective of some ranks of the world; the node with most of them counts."""
        nodes = Counter(rank // self.node_ranks for rank in members)
        return two_levels(operation, n_bytes, max(nodes.values()), len(nodes), self.node, self.cluster)
