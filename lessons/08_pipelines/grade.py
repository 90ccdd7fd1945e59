"""Lesson 08, the grader: stages, GPipe's schedule and time, one stage of it, and a tied weight."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import numpy as np

import minipar
from minipar.comm import Clock
from minipar.errors import UsageError
from minipar.grading import Lesson, Run, close, shaped, wrong
from minipar.parallel.pipeline import Action, Costs, build_schedule, simulate

lesson = Lesson(8)
Array = np.ndarray


# --- split_stages -------------------------------------------------------------------------------------------


@lesson.probe
def split(submission: Any, costs: list[float], stages: int) -> Any:
    return submission.split_stages(costs, stages)


def best_maximum(costs: list[float], stages: int) -> float:
    """Return the smallest possible largest stage, by trying every cut."""
    ends = range(1, len(costs))
    return min(
        max(sum(costs[a:b]) for a, b in pairwise((0, *cut, len(costs))))
        for cut in combinations(ends, stages - 1)
    )


@lesson.check("blocks are split so that the slowest stage is as fast as possible", points=4)
def check_split(run: Run) -> None:
    rng = np.random.default_rng(81)
    cases = [
        ([3, 1, 4, 1, 5, 9, 2, 6], 3),
        ([1, 1, 1, 9], 2),
        ([5], 1),
        ([2, 2, 2, 2], 4),
        ([9, 1, 1, 1, 1], 3),
    ]
    cases += [(rng.integers(1, 20, n).tolist(), k) for n, k in ((9, 2), (10, 4), (12, 5))]
    for costs, stages in cases:
        got = run(split, [float(c) for c in costs], stages)
        where = f"split_stages({costs}, {stages})"
        if not isinstance(got, list | tuple) or len(got) != stages:
            wrong(f"{where} must return {stages} stages")
        found = [(int(start), int(stop)) for start, stop in got]
        if any(start >= stop for start, stop in found):
            wrong(
                f"{where} = {found}: a stage without blocks would do nothing but pass its input on", points=1
            )
        if [0, *(stop for _, stop in found)] != [*(start for start, _ in found), len(costs)]:
            wrong(
                f"{where} = {found}: the stages must follow each other from 0 to {len(costs)}, without gap or overlap"
            )
        sums, best = [sum(costs[a:b]) for a, b in found], best_maximum(costs, stages)
        if max(sums) <= best:
            continue
        sizes = [stop - start for start, stop in found]
        if max(sizes) - min(sizes) <= 1:
            wrong(
                f"{where}: every stage has as many blocks, and the sums are {sums}; blocks differ in cost, and the"
                f" slowest stage sets the pace. {best} is possible"
            )
        wrong(
            f"{where} = {found}: the largest stage has {max(sums)}, {best} is possible. Filling stages one by one up"
            " to the average leaves too much for the last, or cuts just before a large block; all cuts must be"
            " compared, with dynamic programming or one by one",
            points=1,
        )


# --- gpipe --------------------------------------------------------------------------------------------------


@lesson.probe
def schedule(submission: Any, stages: int, microbatches: int) -> Any:
    return [list(actions) for actions in submission.gpipe(stages, microbatches)]


@lesson.check("GPipe's schedule: all forwards, then all backwards", points=3)
def check_schedule(run: Run) -> None:
    for p, m in ((3, 4), (4, 2), (1, 3), (5, 1)):
        got = run(schedule, p, m)
        where = f"gpipe({p}, {m})"
        if len(got) != p:
            wrong(f"{where} has {len(got)} lists; one for each of the {p} stages was expected")
        actions = [[(str(kind), int(i)) for kind, i in stage] for stage in got]
        every = sorted((kind, i) for kind in "BF" for i in range(m))
        for stage, mine in enumerate(actions):
            if sorted(mine) != every:
                missing = sorted(set(every) - set(mine))
                wrong(
                    f"{where}, stage {stage}: F and B of every microbatch once were expected, from 0 to {m - 1}; "
                    + (
                        f"missing: {', '.join(f'{k}{i}' for k, i in missing)}"
                        if missing
                        else "there are others, too"
                    )
                )
        try:
            run_of = simulate([[Action(k, i, 0, s) for k, i in mine] for s, mine in enumerate(actions)])  # type: ignore[arg-type]
        except UsageError as error:
            wrong(f"{where} cannot be carried out: {error}")
        kinds = ["".join(kind for kind, _ in mine) for mine in actions]
        if m > 1 and p > 1 and run_of.bubble == Fraction(p - 1, p):
            wrong(
                f"{where}: one microbatch goes through all stages and back before the next one starts, so a single"
                f" stage works at any time: the bubble is {run_of.bubble}, GPipe's is {Fraction(p - 1, m + p - 1)}"
            )
        if any(k != "F" * m + "B" * m for k in kinds):
            wrong(
                f"{where}: a stage does its first B before its last F; that is another schedule (lesson 09)",
                points=1,
            )
        forwards, backwards = ([i for k, i in actions[0] if k == kind] for kind in "FB")
        orders = [list(range(m)), list(range(m))[::-1]]
        same = all([i for k, i in mine if k == "F"] == forwards for mine in actions) and all(
            [i for k, i in mine if k == "B"] == backwards for mine in actions
        )
        if not same or run_of.bubble != Fraction(p - 1, m + p - 1):
            wrong(
                f"{where}: the stages take the microbatches in different orders, so they wait for each other: the"
                f" bubble is {run_of.bubble}, not {Fraction(p - 1, m + p - 1)}"
            )
        if forwards != orders[0] or backwards not in orders:
            wrong(
                f"{where}: forwards come in ascending order, backwards in ascending or descending order",
                points=2,
            )


# --- gpipe_seconds ------------------------------------------------------------------------------------------


@lesson.probe
def seconds(submission: Any, forward: list[float], backward: list[float], m: int, message: float) -> Any:
    return float(submission.gpipe_seconds(forward, backward, m, message))


@lesson.check("the time of a GPipe step, with unequal stages and messages", points=4)
def check_seconds(run: Run) -> None:
    equal, unequal = ([1.0] * 4, [2.0] * 4), ([1.0, 3.0, 2.0], [4.0, 2.0, 5.0])
    for (f, b), m, message in (
        (equal, 8, 0.0),
        (equal, 1, 0.0),
        (unequal, 6, 0.0),
        (equal, 5, 0.25),
        (unequal, 4, 0.5),
    ):
        p = len(f)
        got = run(seconds, f, b, m, message)
        schedule_ = build_schedule("gpipe", p, m)
        right = float(simulate(schedule_, Costs(f, b, 0, message)).makespan)
        if close(got, right):
            continue
        where = f"gpipe_seconds({f}, {b}, {m}, {message})"
        both = [x + y for x, y in zip(f, b)]
        crossing = (p - 1) * message
        if close(got, m * sum(both) + 2 * m * crossing):
            wrong(
                f"{where}: the stages' times are added up for every microbatch, as if only one stage ever worked"
            )
        if close(got, m * max(both)) or close(got, m * (max(f) + max(b))):
            wrong(
                f"{where} counts the busy time of one stage: the last stage starts only when the first microbatch has"
                " come through all others, and the first one ends only when the last gradient has come back"
            )
        mean = sum(sum(c) * (1 + (m - 1) / p) for c in (f, b))
        if close(got, mean) or close(got, mean + 2 * crossing):
            wrong(
                f"{where} works with the mean of the stages; the others wait for the slowest at every microbatch"
            )
        if close(got, (m + p - 1) * (max(f) + max(b))) or close(got, (m + p - 1) * max(both)):
            wrong(
                f"{where}: m + p - 1 turns of the slowest stage would be right for equal stages. While the first"
                " microbatch goes through, each stage takes its own time: the sum of all, then m - 1 times the largest",
                points=2,
            )
        if close(got, right - 2 * crossing):
            wrong(
                f"{where}: the messages' time is missing; the first one must cross p - 1 boundaries, both ways",
                2,
            )
        if close(got, right - crossing):
            wrong(f"{where}: gradients travel back as well: p - 1 boundaries are crossed twice", points=2)
        if close(got, right + (m - 1) * 2 * crossing):
            wrong(
                f"{where}: messages were counted for every microbatch, but they travel while the stages compute; only"
                " those of filling and draining are waited for",
                points=2,
            )
        if close(got, sum(both) + (m - 1) * max(both) + 2 * crossing):
            wrong(
                f"{where}: the slowest stage of forward and backward together sets the pace in other schedules; GPipe"
                " runs them one after the other, each with a slowest stage of its own",
                points=2,
            )
        wrong(
            f"{where} = {got:g}, a simulation of the schedule takes {right:g}; draw it for 3 stages, 2 microbatches"
        )


# --- gpipe_step ---------------------------------------------------------------------------------------------


@lesson.probe
def step(submission: Any, weights: list[Array], inputs: list[Array], targets: list[Array], count: int) -> Any:
    def one_rank() -> Any:
        comm = minipar.world()
        xs, ts = [x.copy() for x in inputs], [t.copy() for t in targets]
        gradient = submission.gpipe_step(comm, weights[comm.rank].copy(), xs, ts, count)
        sent = [row.calls for row in comm.ledger.rows("send")]
        others = [row.operation for row in comm.ledger.rows() if row.operation not in ("send", "recv")]
        return gradient, float(comm.now()), sum(sent), others

    return minipar.launch(one_rank, ranks=len(weights), timeout=5, clock=Clock())


def chain(weights: list[Array], x: Array, t: Array) -> list[Array]:
    """Return each stage's gradient of half the sum of squares of these samples."""
    xs = [x]
    for w in weights:
        xs.append(np.tanh(xs[-1] @ w.T))
    g, found = xs[-1] - t, []
    for k in reversed(range(len(weights))):
        g = g * (1 - xs[k + 1] ** 2)
        found.append(g.T @ xs[k])
        g = g @ weights[k]
    return found[::-1]


SIZES = [3, 2, 3, 1]


def step_case(sizes: list[int]) -> tuple[list[Array], list[Array], list[Array]]:
    """Return the weights of three stages, and microbatches of these sizes."""
    rng = np.random.default_rng(82)
    weights = [rng.normal(size=(4, 4)) for _ in range(3)]
    return weights, *([rng.normal(size=(n, 4)) for n in sizes] for _ in range(2))


@lesson.check("every stage's gradient is the serial one", points=5)
def check_step(run: Run) -> None:
    for sizes in ([2, 2, 2], SIZES):
        judge_step(run, sizes)


def judge_step(run: Run, sizes: list[int]) -> None:
    weights, xs, ts = step_case(sizes)
    count, m = sum(sizes), len(sizes)
    pieces = [chain(weights, x, t) for x, t in zip(xs, ts)]
    got = run(step, weights, xs, ts, count)
    gradients = [shaped(g, (4, 4), np.float64, f"the gradient of stage {s}") for s, (g, *_) in enumerate(got)]

    def summed(scale: list[float]) -> list[Array]:
        return [sum(c * piece[s] for c, piece in zip(scale, pieces)) for s in range(3)]

    right = summed([1 / count] * m)
    if close(gradients, right):
        return
    known = (
        ([1.0] * m, "is not divided by count"),
        ([1 / n for n in sizes],
         "has the mean of each microbatch added up, about m times too large: the loss is divided by the count of the"
         " whole batch, once"),
        ([1 / n / m for n in sizes],
         "is the mean of the microbatches' means: samples of short microbatches weigh more; each is divided by count"),
        ([1 / count / m] * m, f"is {m} times too small: microbatches are summed, count has averaged already"),
        ([0.0] * (m - 1) + [1 / count], "is the last microbatch's: gradients must be added up, not overwritten"),
        ([1 / count] + [0.0] * (m - 1), "is the first microbatch's alone"),
    )  # fmt: skip
    for scale, reason in known:
        if close(gradients, summed(scale)):
            wrong(f"the gradient {reason}", points=1)
    if len(set(sizes)) == 1:
        stale = sum(chain(weights, xs[-1], t)[-1] for t in ts) / count
        if close(gradients[-1], stale):
            wrong(
                "backward of every microbatch used the activations of the last one. When GPipe's first backward begins"
                " all forwards are done: x and y of each microbatch must be kept until its own backward",
                points=1,
            )
    if close(gradients[-1], right[-1]):
        wrong(
            "the last stage's gradient is right, the others' are not: what is sent back is the gradient of the stage's"
            " input, g (1 - y²) W, and it must meet the x and y of the same microbatch",
            points=2,
        )
    if close(gradients[0], right[0]):
        wrong(
            "stage 0's gradient is right, later ones are not: which x does backward read there, that of its own"
            " microbatch or the one received last?",
            points=2,
        )
    wrong(
        "the gradients are not the serial ones on any stage; compare with one stage and one microbatch first"
    )


@lesson.check("the stages work at the same time", points=3)
def check_step_time(run: Run) -> None:
    weights, xs, ts = step_case(SIZES)
    p, m = len(weights), len(xs)
    got = run(step, weights, xs, ts, sum(SIZES))
    took, right = max(now for _, now, _, _ in got), 3.0 * (m + p - 1)
    for s, (_, _, sent, others) in enumerate(got):
        expected = m * ((s > 0) + (s < p - 1))
        if others or sent != expected:
            wrong(
                f"stage {s} sent {sent} messages" + (f" and called {', '.join(sorted(set(others)))}" if others else "")
                + f"; expected is one a microbatch to each neighbour: {expected}"
            )  # fmt: skip
    if close(took, right):
        return
    if took == 0:
        wrong("no time was declared: comm.compute(1.0) for each forward, comm.compute(2.0) for each backward")
    if close(took, 3.0 * m * p):
        wrong(
            f"the step took {took:g} s of virtual time, {m} microbatches × {p} stages × 3 s: one microbatch goes all"
            " the way before the next one starts. Run all forwards first"
        )
    if took < right:
        wrong(
            f"the step took {took:g} s of virtual time, less than the {right:g} s that are possible: were results sent"
            " on before the time of making them was declared, or some actions not declared?",
            points=1,
        )
    wrong(f"the step took {took:g} s of virtual time; (m + p - 1) turns of 1 + 2 s are {right:g} s", points=1)


# --- tied_step ----------------------------------------------------------------------------------------------


@lesson.probe
def tied(
    submission: Any, weights: list[Array], table: Array, ids: list[Array], targets: list[Array], lr: float
) -> Any:
    ranks = len(weights)

    def one_rank() -> Any:
        comm = minipar.world()
        mine = table.copy() if comm.rank in (0, ranks - 1) else None
        count = sum(map(len, ids))
        weight = weights[comm.rank].copy()
        return submission.tied_step(
            comm, weight, mine, [i.copy() for i in ids], [t.copy() for t in targets], count, lr
        )

    return minipar.launch(one_rank, ranks=ranks, timeout=5)


def tied_gradients(
    weights: list[Array], table: Array, ids: Array, targets: Array
) -> tuple[list[Array], Array, Array]:
    """Return the weights' gradients, and the table's from looking up and from the logits, for all samples."""
    xs = [table[ids]]
    for w in weights:
        xs.append(np.tanh(xs[-1] @ w.T))
    logits = xs[-1] @ table.T
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    probs[np.arange(len(ids)), targets] -= 1
    probs /= len(ids)
    out, g, found = probs.T @ xs[-1], probs @ table, []
    for k in reversed(range(len(weights))):
        g = g * (1 - xs[k + 1] ** 2)
        found.append(g.T @ xs[k])
        g = g @ weights[k]
    looked_up = np.zeros_like(table)
    np.add.at(looked_up, ids, g)
    return found[::-1], looked_up, out


@lesson.check("the bug hunt: a tied table is one weight, wherever its copies are", points=4)
def check_tied(run: Run) -> None:
    rng = np.random.default_rng(83)
    lr = 0.5
    for ranks in (3, 2, 1):
        weights, table = [rng.normal(size=(3, 3)) for _ in range(ranks)], rng.normal(size=(6, 3))
        ids, targets = ([rng.integers(0, 6, n) for n in (3, 2)] for _ in range(2))
        got = run(tied, weights, table, ids, targets, lr)
        dweights, looked_up, out = tied_gradients(
            weights, table, np.concatenate(ids), np.concatenate(targets)
        )
        for s, (weight, _) in enumerate(got):
            if not close(
                shaped(weight, (3, 3), np.float64, f"the weight of stage {s}"), weights[s] - lr * dweights[s]
            ):
                wrong(f"the weight of stage {s} was right before, and is not any more")
        for s in range(1, ranks - 1):
            if got[s][1] is not None:
                wrong(f"stage {s} holds no table, and returned one")
        first, last = (
            shaped(got[s][1], table.shape, np.float64, f"the table of stage {s}") for s in (0, ranks - 1)
        )
        right = table - lr * (looked_up + out)
        if close(first, right) and close(last, right):
            if not np.array_equal(first, last):
                wrong(
                    "the two copies differ in their last bits, and will drift apart: both must add the same two"
                    " numbers, and nothing else in another order",
                    points=3,
                )
            continue
        if close(first, table - lr * looked_up) and close(last, table - lr * out):
            wrong(
                "each copy of the table takes a step with the gradient of its own use: after it the two stages hold"
                " different tables. The weight is one, so its gradient is the sum over both uses, on both stages"
            )
        half = table - lr * (looked_up + out) / 2
        if close(first, half) and close(last, half):
            wrong("the two uses were averaged: the serial gradient is their sum", points=1)
        twice = table - 2 * lr * (looked_up + out)
        if close(first, twice) or close(last, twice):
            wrong("the sum of the two uses was counted twice", points=1)
        if close(first, right) or close(last, right):
            stale = "last" if close(first, right) else "first"
            wrong(
                f"one copy has the sum of both uses, the {stale} stage's has not: it needs it as well",
                points=1,
            )
        if close(first, last):
            wrong(
                "the copies are equal, but not the serial table after the step: which gradients were added?",
                points=1,
            )
        wrong("the tables are not those of the serial model after the step")
