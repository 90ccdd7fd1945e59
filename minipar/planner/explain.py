"""What a plan means, in words: why the winner wins, where its axes lie, and data or model parallelism."""

from __future__ import annotations

from minipar.planner.collectives import axis_groups, link_of
from minipar.planner.layout import Layout
from minipar.planner.machine import Machine
from minipar.planner.memory import memory
from minipar.planner.plan import Candidate, Plan
from minipar.planner.step_time import predict
from minipar.units import bytes_text

NEAR = 0.02  # differences below this part of the winner's step are no reason


def seconds_text(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("unreachable")


def pace_text(pace: float) -> str:
    """Say how the machine's pace differs from that of its calibration, and that predictions follow it."""
    if abs(pace - 1) < NEAR:
        return "the machine is as fast as when it was calibrated"
    slower = (
        f"slower, {pace:.2f} times as long a step," if pace > 1 else f"faster, {pace:.2f} of the time a step,"
    )
    return f"the machine is {slower} than when it was calibrated; these predictions are for its pace now"


def step_parts(c: Candidate) -> dict[str, float]:
    """Return a step's seconds by what they go into; together the whole step."""
    s = c.step
    waiting = max(0.0, s.seconds - s.compute - s.exposed - s.update - s.fixed)
    return {
        "computation": s.compute - s.tensor_messages,
        "sums between tensor-parallel ranks": s.tensor_messages,
        "waiting in the pipeline": waiting,
        "gradients and parameters that nothing hides": s.exposed,
        "the optimizer": s.update,
        "small sums and what is no operation": s.fixed,
    }


def winner_text(plan: Plan) -> str:
    """Return two sentences: why the winner is faster than the runner-up, and what its axes cost where they lie."""
    best = plan.best
    placed = placement_text(plan.machine, best)
    if len(plan.candidates) == 1:
        return f"{best.layout} is the only layout that is possible. {placed}"
    second = plan.candidates[1]
    gap = second.step.seconds / best.step.seconds - 1
    mine, theirs = step_parts(best), step_parts(second)
    differences = sorted(((theirs[k] - mine[k], k) for k in mine), reverse=True)
    small = NEAR * best.step.seconds
    gains = [f"{seconds_text(d)} less in {k}" for d, k in differences if d > small or 0 < d == differences[0][0]][:2]
    losses = [f"{seconds_text(-d)} more in {k}" for d, k in reversed(differences) if -d > small][:1]
    text = (
        f"{best.layout} takes {seconds_text(best.step.seconds)} a step, and {second.layout} {100 * gap:.1f} %"
        f" longer: the winner spends {' and '.join(gains) or 'as much in everything'}"
        f"{', but ' + losses[0] if losses else ''}."
    )
    return f"{text} {placed}"


def placement_text(machine: Machine, c: Candidate) -> str:
    """Return one sentence: which axis lies where, and what it sends there in a step."""
    groups = axis_groups(c.layout.dp, c.layout.pp, c.layout.tp)
    words = {
        "tp": "tensor parallelism, which sends most and waits for it,",
        "pp": "the pipeline, which sends single activations,",
        "dp": "data parallelism, which sums gradients once a step,",
    }
    places = []
    for axis in ("tp", "pp", "dp"):
        if groups[axis].ranks == 1:
            continue
        inside = link_of(machine, groups[axis]) is machine.node
        where = "inside a node" if inside else "across nodes"
        if machine.node == machine.cluster:
            where = "between the ranks"
        verb = "stays" if where == "inside a node" else "goes"
        places.append(f"{words[axis]} {verb} {where} ({bytes_text(c.traffic[axis])} a rank)")
    if not places:
        return "Nothing is sent."
    joined = "; ".join(places)
    return joined[0].upper() + joined[1:] + "."


def advice(plan: Plan) -> list[str]:
    """Return the simple case in plain words: data parallelism, or model parallelism?

    One line for each kind on all ranks: what it gains, what it costs on this model and machine; then which.
    """
    n, shape = plan.ranks, plan.shape
    if n == 1:
        return ["One rank: there is nothing to divide."]
    alone = memory(shape, Layout(microbatches=plan.batch), plan.batch, plan.precision)[0]
    state = alone.total - alone.activations
    out = [
        f"One rank alone would hold {bytes_text(state)} of weights, gradients and optimizer state, and"
        f" {bytes_text(alone.activations)} of activations for each sample that it takes at once."
    ]
    kinds = {
        "Data parallelism": ("dp", "every rank holds the whole model and takes a part of the batch"),
        "Pipeline parallelism": ("pp", "every rank holds some of the blocks and waits for its neighbours"),
        "Tensor parallelism": ("tp", "every rank holds a part of each layer and sums within each layer"),
    }
    for name, (axis, what) in kinds.items():
        pure = sorted(
            (c for c in plan.candidates if getattr(c.layout, axis) == n), key=lambda c: c.layout.zero
        )  # plain data parallelism, or the first ZeRO stage that fits
        if not pure:
            why = next((r for r, which in plan.refused.items() if any(_is_pure(w, axis, n) for w in which)), None)
            out.append(f"{name}: not possible on {n} ranks{': ' + why if why else ''}.")
            continue
        c = pure[0]
        waits = c.step.exposed + c.step.tensor_messages
        out.append(
            f"{name}: {what}{f', its state divided by ZeRO {c.layout.zero}' if c.layout.zero else ''}."
            f" {seconds_text(c.step.seconds)} a step, {bytes_text(c.memory.total)} a rank;"
            f" sends {bytes_text(sum(c.traffic.values()))} a rank, which makes the step {seconds_text(waits)} longer"
            f"{f', and idles {100 * c.step.bubble:.0f} % of the time' if axis == 'pp' else ''}."
        )
    serial = predict(shape, plan.machine, Layout(), plan.batch, plan.precision).seconds
    best = plan.best
    used = [axis for axis in ("dp", "pp", "tp") if getattr(best.layout, axis) > 1]
    which = {"dp": "data", "pp": "pipeline", "tp": "tensor"}
    names = " and ".join(which[a] for a in used) + " parallelism" + (" together" if len(used) > 1 else "")
    fits = alone.total <= plan.limit
    if fits and serial < best.step.seconds:
        out.append(
            f"Here: do not divide it. One rank alone takes {seconds_text(serial)} a step, the best of {n} ranks,"
            f" {best.layout}, {seconds_text(best.step.seconds)}: what is sent takes longer than what is saved."
        )
        return out
    reason = (
        "the model fits one rank, so the cheapest way to divide the work decides" if fits
        else "the model does not fit one rank, so it has to be cut"
    )  # fmt: skip
    out.append(
        f"Here: {names}, {best.layout}; {reason}. {serial / best.step.seconds:.3g} times as fast as one rank"
        f"{' would be' if not fits else ''}."
    )
    return out


def _is_pure(words: str, axis: str, n: int) -> bool:
    return f"{axis} {n}" in words and all(
        f"{other} 1" in words or other not in words for other in ("dp", "pp", "tp") if other != axis
    )
