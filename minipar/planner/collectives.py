"""Seconds of a collective in the α–β model, on a flat network and on nodes joined by a slower one.

A message of n bytes takes α + βn. Costs of the single algorithms are in `comm.collectives` (all-reduce by
ring, tree, recursive doubling, halving and doubling) and `comm.clock` (all others); here they are put together
for groups of ranks that lie inside nodes, across them, or both.
"""

from __future__ import annotations

from typing import NamedTuple

from minipar.comm.clock import Clock
from minipar.comm.levels import two_levels
from minipar.planner.machine import Link, Machine


class Group(NamedTuple):
    """Ranks of one axis: how many, and how far apart in the numbering of all ranks."""

    ranks: int
    stride: int

    def inside(self, node_ranks: int) -> int:
        """Return how many of them share a node of `node_ranks` ranks."""
        return max(1, min(self.ranks, node_ranks // self.stride))


def axis_groups(dp: int, pp: int, tp: int) -> dict[str, Group]:
    """Return the groups of a mesh, tensor parallelism innermost and data parallelism outermost (see `Mesh`)."""
    return {"tp": Group(tp, 1), "pp": Group(pp, tp), "dp": Group(dp, pp * tp)}


class Cost(NamedTuple):
    """Seconds of a communication: those that a core spends on it, and those in which it could compute."""

    busy: float
    wire: float

    @property
    def total(self) -> float:
        """Seconds until it is complete, if nothing else goes on."""
        return self.busy + self.wire

    def __add__(self, other: object) -> Cost:  # two communications one after the other
        assert isinstance(other, Cost)
        return Cost(self.busy + other.busy, self.wire + other.wire)

    def times(self, n: float) -> Cost:
        """Return n such communications one after the other."""
        return Cost(n * self.busy, n * self.wire)


NOTHING = Cost(0.0, 0.0)
SYMMETRIC = "symmetric_all_reduce"  # as a machine's measurements call an all-reduce in symmetric memory


def link_of(machine: Machine, group: Group) -> Link:
    """Return the slowest link between two neighbours of the group."""
    return machine.node if _in_a_node(machine, group) else machine.cluster


def _in_a_node(machine: Machine, group: Group) -> bool:
    return group.ranks * group.stride <= machine.node_ranks


def _split(seconds: float, overlap: float) -> Cost:
    return Cost((1 - overlap) * seconds, overlap * seconds)


def on_link(operation: str, n_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of a collective on one link level, in the bandwidth-optimal algorithm.

    Thakur et al. 2005 and Patarasuk and Yuan 2009; see `comm.clock.Clock.collective` for each formula.
    """
    return Clock(link.alpha, link.beta).collective(operation, n_bytes, ranks)


def collective(machine: Machine, operation: str, n_bytes: float, group: Group) -> Cost:
    """Return the cost of a collective on `n_bytes` in all over a group.

    Measured times of this machine (`minipar calibrate`) are used where there are any. A group that spans nodes
    works in two levels: within the node, between nodes on the k-th part each (k ranks a node), within the node.
    Every rank has its own way out of the node, as GPU servers with a network card for each GPU have.

    Args:
        operation: `SYMMETRIC` is an all-reduce like any other where it was not measured.
    """
    if group.ranks == 1:
        return NOTHING
    plain = "all_reduce" if operation == SYMMETRIC else operation
    cost = _measured(machine, operation, n_bytes, group) or _measured(machine, plain, n_bytes, group)
    if cost is None:
        cost = _split(_two_levels(machine, plain, n_bytes, group), link_of(machine, group).overlap)
    if machine.wire is not None:
        cost = _on_wire(cost, on_link(plain, n_bytes, group.ranks, machine.wire))
    return cost


def _on_wire(cost: Cost, seconds: float) -> Cost:
    """Return the cost behind an imitated network: what is copied meanwhile is on the wire at the same time."""
    return Cost(cost.busy, max(cost.wire, seconds - cost.busy))


def _measured(machine: Machine, operation: str, n_bytes: float, group: Group) -> Cost | None:
    if machine.measured is None or not _in_a_node(machine, group):
        return None
    found = machine.measured.collective(operation, n_bytes, group.ranks)
    if found is None:
        return None
    return _split(found, 0.0 if operation == SYMMETRIC else machine.node.overlap)  # its ranks copy by themselves


def _two_levels(machine: Machine, operation: str, n_bytes: float, group: Group) -> float:
    """Return the seconds on k ranks of each node: `comm.levels.two_levels`, after Cho et al. 2019."""
    k = group.inside(machine.node_ranks)
    node, cluster = (Clock(link.alpha, link.beta) for link in (machine.node, machine.cluster))
    return two_levels(operation, n_bytes, k, -(-group.ranks // k), node, cluster)


def message(machine: Machine, n_bytes: float, group: Group) -> Cost:
    """Return the cost of sending `n_bytes` to the next rank of a group: α + βn seconds."""
    if group.ranks == 1:
        return NOTHING
    link = link_of(machine, group)
    cost = _measured(machine, "send", n_bytes, group._replace(ranks=2))
    if cost is None:
        cost = _split(link.alpha + link.beta * n_bytes, link.overlap)
    if machine.wire is not None:
        cost = _on_wire(cost, machine.wire.alpha + machine.wire.beta * n_bytes)
    return cost
