"""Insert sends and receives into a schedule of computations, and replay it with blocking sends.

    with_communication(one_f_one_b(2, 4))[1][:4]     # RECV_F0 F0 RECV_F1 B0 on stage 1

An activation goes forward to the next virtual stage and its gradient comes back; between chunks of one rank
nothing is sent. A send follows the action that made the array. Where the receive goes decides whether the
schedule survives sends that block until they are received:

    early   when the array is ready, by the clock of unit costs. All lists then tell one story in one order,
            so even with blocking sends whoever is first in that order can always go on: no deadlock.
    late    straight before the action that uses it, as one writes by hand. Fewest buffers; but in 1F1B
            stage s sends an activation while stage s + 1 sends a gradient, and with blocking sends both
            wait for ever. `must_not_block` names those sends.

The executor's sends do not block, and its receives are only posted where they stand (the action that uses the
array waits for it), so that early receives let messages travel while the ranks compute.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from minipar.errors import UsageError
from minipar.parallel.pipeline.action import (
    COMPUTE,
    RECV_B,
    RECV_F,
    SEND_B,
    SEND_F,
    SENDS,
    Action,
    F,
    Message,
    Schedule,
    Sizes,
    W,
    compute_only,
    has_communication,
    message,
    sizes,
    virtual_stage,
)
from minipar.parallel.pipeline.simulator import Cost, Standstill, Wait, simulate, waiting_cycle


def with_communication(
    schedule: Schedule, receives: Literal["early", "late"] = "early"
) -> list[list[Action]]:
    """Return the schedule with its sends and receives, each naming the stage at the other end in `peer`.

    Raises UsageError if the schedule has communication already, or cannot be carried out in any way.
    """
    if has_communication(schedule):
        raise UsageError("the schedule has sends and receives already; insert them into a compute-only one")
    if receives not in ("early", "late"):
        raise UsageError(f"receives {receives!r}: they can be early or late")
    size = sizes(schedule)
    if receives == "late":
        return [_beside_their_actions(actions, size) for actions in compute_only(schedule)]
    # A message takes place when its sender is done, before whatever starts at that time.
    events: list[tuple[tuple[Cost, int], tuple[Action, ...]]] = []
    for spans in simulate(schedule).spans:
        for action, start, end in spans:
            events.append(((start, 1), (action,)))
            if pair := sent_after(action, size):
                events.append(((end, 0), pair))
    out: list[list[Action]] = [[] for _ in schedule]
    for _, together in sorted(events, key=lambda event: event[0]):
        for action in together:
            out[action.stage].append(action)
    return out


def sent_after(action: Action, size: Sizes) -> tuple[Action, Action] | None:
    """Return the send of what an action made, and its receive; None if it stays on this rank."""
    p, last = size.stages, size.stages * size.chunks - 1
    here = virtual_stage(action, p)
    there = here + 1 if action.kind == F else here - 1
    if p == 1 or action.kind == W or not 0 <= there <= last:
        return None
    _, i, chunk, stage, _ = action
    chunk_there, peer = divmod(there, p)
    send, receive = (SEND_F, RECV_F) if action.kind == F else (SEND_B, RECV_B)
    return Action(send, i, chunk, stage, peer), Action(receive, i, chunk_there, peer, stage)


def received_before(action: Action, size: Sizes) -> Action | None:
    """Return the receive that an action needs; None if its input is on this rank."""
    p, last = size.stages, size.stages * size.chunks - 1
    here = virtual_stage(action, p)
    source = here - 1 if action.kind == F else here + 1
    if p == 1 or action.kind == W or not 0 <= source <= last:
        return None
    kind, i, chunk, stage, _ = action
    return Action(RECV_F if kind == F else RECV_B, i, chunk, stage, source % p)


def _beside_their_actions(actions: list[Action], size: Sizes) -> list[Action]:
    out: list[Action] = []
    for action in actions:
        receive, pair = received_before(action, size), sent_after(action, size)
        out += [receive] if receive else []
        out += [action]
        out += [pair[0]] if pair else []
    return out


class Replay(NamedTuple):
    """What came of a schedule with blocking sends."""

    must_not_block: list[Action]  # sends that closed a ring of waiting stages, in the order of being met
    first_ring: list[Wait]  # the first such ring; empty if no stage ever waited in one
    stuck: dict[int, Wait]  # stages that go no further even when those sends do not block


def replay(schedule: Schedule) -> Replay:
    """Carry out a schedule with communication, each send waiting for its receive, and say where that ends.

    In each ring of stages that wait for each other the sends are let go, as if they did not block.
    """
    p = len(schedule)
    at = [0] * p  # the position of each stage
    sent: set[Message] = set()  # messages on their way, their senders let go
    out = Replay([], [], {})
    awake = list(range(p))
    while True:
        while awake:
            s = awake.pop()
            while at[s] < len(schedule[s]):
                action = schedule[s][at[s]]
                if action.kind in COMPUTE:
                    at[s] += 1
                    continue
                on, mine = action.peer, message(action, p)
                if mine in sent:  # only a receive comes here after its message was let go
                    at[s] += 1
                    continue
                other = schedule[on][at[on]] if on is not None and at[on] < len(schedule[on]) else None
                if other is None or other.kind in COMPUTE or other.peer != s or message(other, p) != mine:
                    break
                at[s] += 1
                at[on] += 1  # type: ignore[index]
                awake.append(on)  # type: ignore[arg-type]
        waits = {s: _wait(schedule[s][at[s]], at[s]) for s in range(p) if at[s] < len(schedule[s])}
        if not waits:
            return out
        ring = waiting_cycle(waits)
        if not out.first_ring:
            out.first_ring.extend(ring)
        sends = [wait for wait in ring if wait.action.kind in SENDS]
        if not sends or len(ring) == 1:
            out.stuck.update(waits)
            return out
        for wait in sends:
            out.must_not_block.append(wait.action)
            sent.add(message(wait.action, p))
            at[wait.stage] += 1
            awake += [wait.stage, wait.on]


def must_not_block(schedule: Schedule) -> list[Action]:
    """Return the sends of a schedule with communication that may not block, or it would not end.

    Raises Standstill if it does not end even so: a stage waits for a message that its sender, itself waiting,
    has yet to come to.
    """
    found = replay(schedule)
    if found.stuck:
        raise Standstill(waiting_cycle(found.stuck))
    return found.must_not_block


def _wait(action: Action, position: int) -> Wait:
    needs = {SEND_F: RECV_F, RECV_F: SEND_F, SEND_B: RECV_B, RECV_B: SEND_B}[action.kind]
    on = -1 if action.peer is None else action.peer
    return Wait(action.stage, position, action, on, f"{needs}{action.microbatch}")
