"""The words of a schedule: actions, and where they take place.

A schedule is a list of actions for each stage, in the order in which that stage carries them out. It is
plain data: compare it, print it, change it by hand. With several chunks a rank holds several parts of the
model: chunk c of stage s (its rank) is virtual stage c * stages + s, so an activation goes round the ranks
once for each chunk.

    F   forward
    B   backward, all of it: I and W together
    I   the part of backward that gives the gradient of the stage's input, for which the stage before waits
    W   the part that gives the gradients of the weights, for which nobody waits
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from minipar.comm.member import HIGHEST_TAG
from minipar.errors import UsageError

Kind = Literal["F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]

F: Kind = "F"
B: Kind = "B"
I: Kind = "I"
W: Kind = "W"
SEND_F: Kind = "SEND_F"  # an activation to the next virtual stage
RECV_F: Kind = "RECV_F"
SEND_B: Kind = "SEND_B"  # the gradient of an activation to the virtual stage before
RECV_B: Kind = "RECV_B"

COMPUTE: tuple[Kind, ...] = (F, B, I, W)
SENDS: tuple[Kind, ...] = (SEND_F, SEND_B)
RECEIVES: tuple[Kind, ...] = (RECV_F, RECV_B)


class Action(NamedTuple):
    """One step of one stage: what, on which microbatch, for which of its chunks; of a message, with whom."""

    kind: Kind
    microbatch: int
    chunk: int = 0
    stage: int = 0
    peer: int | None = None  # the other stage of a send or a receive

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f" of chunk {self.chunk}" if self.chunk else "")


Schedule = Sequence[Sequence[Action]]
"""schedule[stage][position]"""


class Sizes(NamedTuple):
    """How many stages (ranks), microbatches and chunks a schedule speaks of."""

    stages: int
    microbatches: int
    chunks: int


class Message(NamedTuple):
    """What a send and its receive have in common: name and direction of an array on its way."""

    kind: Literal["F", "B"]
    microbatch: int
    source: int  # virtual stage that sends


MOST_ACTIONS = 500_000  # of all stages: a few seconds' work to check, and no picture shows as many


def refuse_too_many(size: Sizes) -> None:
    """Raise UsageError for sizes whose forwards and backwards are more than `MOST_ACTIONS`."""
    actions = 2 * size.stages * size.microbatches * size.chunks
    if actions > MOST_ACTIONS:
        of = f", {size.chunks} chunks" if size.chunks > 1 else ""
        raise UsageError(
            f"schedule: {size.stages} stages and {size.microbatches} microbatches{of} are {actions:,} actions, more"
            f" than {MOST_ACTIONS:,}"
        )


def sizes(schedule: Schedule) -> Sizes:
    """Return the sizes of a schedule, from the largest microbatch and chunk in it."""
    microbatches = max((a.microbatch for actions in schedule for a in actions), default=-1) + 1
    chunks = max((a.chunk for actions in schedule for a in actions), default=-1) + 1
    return Sizes(len(schedule), microbatches, chunks)


def virtual_stage(action: Action, stages: int) -> int:
    """Return the virtual stage of an action: chunk * stages + stage."""
    return action.chunk * stages + action.stage


def message(action: Action, stages: int) -> Message:
    """Return the message of a send or a receive: equal for the two that belong together."""
    here = virtual_stage(action, stages)
    if action.kind in (SEND_F, RECV_F):
        return Message("F", action.microbatch, here - (action.kind == RECV_F))
    return Message("B", action.microbatch, here + (action.kind == RECV_B))


def tag(action: Action, stages: int, microbatches: int) -> int:
    """Return the tag for a send or a receive: between one pair of ranks no two messages share it."""
    kind, microbatch, source = message(action, stages)
    return (2 * (source // stages) + (kind == "B")) * microbatches + microbatch


def refuse_too_many_tags(size: Sizes) -> None:
    """Raise UsageError for a schedule that can be drawn and simulated, and not run: its messages need more tags."""
    most = (HIGHEST_TAG + 1) // (2 * size.chunks)
    if size.microbatches > most:
        of = f" of {size.chunks} chunks" if size.chunks > 1 else ""
        raise UsageError(
            f"schedule: {size.microbatches} microbatches{of} have more messages between two ranks than MPI has tags"
            f" for: use at most {most} microbatches"
        )


def compute_only(schedule: Schedule) -> list[list[Action]]:
    """Return the schedule without its sends and receives."""
    return [[a for a in actions if a.peer is None and a.kind in COMPUTE] for actions in schedule]


def has_communication(schedule: Schedule) -> bool:
    """Return whether there is a send or a receive in the schedule."""
    return any(a.kind not in COMPUTE for actions in schedule for a in actions)
