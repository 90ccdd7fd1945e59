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
    """Return the seconds of a collective on `ranks` ranks of each of `nodes` nodes.

    All-reduce as Cho et al. 2019 ("BlueConnect") take it apart: a reduce-scatter of n bytes within the node, an
    all-reduce of n/k between nodes for each of its k ranks, all at once, and an all-gather within. Any other
    operation is itself on both levels. The k parts share nothing: every rank has its own way out of the node, as
    GPU servers with a network card for each GPU have.
    """
    if nodes == 1:
        return node.collective(operation, n_bytes, ranks)
    if ranks == 1:
        return cluster.collective(operation, n_bytes, nodes)
    between = cluster.collective(operation, n_bytes / ranks, nodes)
    if operation == "all_reduce":
        return 2 * node.collective("reduce_scatter", n_bytes, ranks) + between
    return node.collective(operation, n_bytes, ranks) + between


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
