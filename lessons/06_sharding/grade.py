"""Lesson 06, the grader: partition by bytes and by count, ZeRO 1 and 3, clipping over shards."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

import minipar
from minipar.comm import balanced
from minipar.grading import Lesson, Run, close, shaped, wrong

lesson = Lesson(6)
Array = np.ndarray


def calls_of(comm: Any) -> list[list[Any]]:
    """Return [operation, calls, elements] of this rank's ledger."""
    return [[row.operation, row.calls, row.elements] for row in comm.ledger.rows()]


def told(calls: list[list[Any]]) -> str:
    """Return the ledger in words."""
    return ", ".join(f"{n} × {operation} ({elements} elements in all)" for operation, n, elements in calls)


def total(calls: list[list[Any]], operation: str) -> tuple[int, int]:
    """Return (calls, elements) of one operation."""
    mine = [row for row in calls if row[0] == operation]
    return sum(row[1] for row in mine), sum(row[2] for row in mine)


def ranges(n: int, ranks: int) -> list[slice]:
    """Return the range of each rank."""
    stops = np.cumsum(balanced(n, ranks)).tolist()
    return [slice(stop - count, stop) for stop, count in zip(stops, balanced(n, ranks))]


def same_everywhere(values: list[Array], what: str) -> None:
    """End the check unless all ranks returned the same."""
    for rank, value in enumerate(values):
        if not np.array_equal(value, values[0]):
            wrong(f"{what} differ between rank 0 and rank {rank}: replicas must stay bitwise the same")


# --- place_by_bytes -----------------------------------------------------------------------------------------


@lesson.probe
def placed(submission: Any, sizes: list[int], devices: int) -> Any:
    return submission.place_by_bytes(sizes, devices)


def greedy(sizes: list[int], devices: int, largest_first: bool = True, by_number: bool = False) -> Any:
    """Return the greedy placement, or what a wrong rule gives."""
    held, lists = [0] * devices, [[] for _ in range(devices)]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i]) if largest_first else range(len(sizes))
    for i in order:
        device = min(range(devices), key=lambda d: len(lists[d]) if by_number else held[d])
        held[device] += sizes[i]
        lists[device].append(i)
    return [sorted(indices) for indices in lists]


@lesson.check("whole parameters are placed greedily by their bytes", points=3)
def check_place(run: Run) -> None:
    rng = np.random.default_rng(61)
    cases = [(rng.integers(1, 60, n).tolist(), devices) for n, devices in ((7, 2), (12, 3), (9, 4), (2, 4))]
    for sizes, devices in cases:
        got = run(placed, sizes, devices)
        if not isinstance(got, list | tuple) or len(got) != devices:
            wrong(f"place_by_bytes must return one list for each of the {devices} devices, empty ones too")
        lists = [[int(i) for i in device] for device in got]
        flat = sorted(i for device in lists for i in device)
        if flat != list(range(len(sizes))):
            lost = sorted(set(range(len(sizes))) - set(flat))
            wrong(
                f"place_by_bytes({sizes}, {devices}): every parameter must be on exactly one device; "
                + (f"lost: {lost}" if lost else "some are on two")
            )
        if lists == greedy(sizes, devices):
            continue
        if [sorted(device) for device in lists] == greedy(sizes, devices):
            wrong("the placement is right, but the indices on a device are not ascending", points=2)
        if lists == greedy(sizes, devices, largest_first=False):
            wrong(
                "the parameters were taken in the model's order: a large one that comes last then lands on a"
                " device that is already full; take the largest first",
                points=1,
            )
        if lists in (greedy(sizes, devices, True, True), greedy(sizes, devices, False, True)):
            wrong("devices were balanced by the number of parameters they hold, not by their bytes")
        loads = [sum(sizes[i] for i in device) for device in lists]
        best = [sum(sizes[i] for i in device) for device in greedy(sizes, devices)]
        wrong(
            f"place_by_bytes({sizes}, {devices}): the devices hold {loads} bytes, the greedy rule gives {best};"
            " at each turn the device with fewest bytes so far takes the next parameter"
        )


# --- flat_pieces --------------------------------------------------------------------------------------------


@lesson.probe
def pieces(submission: Any, sizes: list[int], ranks: int) -> Any:
    return submission.flat_pieces(sizes, ranks)


def right_pieces(sizes: list[int], counts: list[int]) -> list[list[tuple[int, int, int]]]:
    line = [(i, k) for i, size in enumerate(sizes) for k in range(size)]
    found, at = [], 0
    for count in counts:
        mine = line[at : at + count]
        owned = sorted({i for i, _ in mine})
        spans = [[k for j, k in mine if j == i] for i in owned]
        found.append([(i, span[0], span[-1] + 1) for i, span in zip(owned, spans)])
        at += count
    return found


@lesson.check("the line of all elements is cut into equal ranges", points=4)
def check_pieces(run: Run) -> None:
    for sizes, ranks in (
        ([5, 1, 4], 3),
        ([6, 6], 4),
        ([3, 0, 11, 2, 7], 4),
        ([2, 1], 5),
        ([9], 1),
        ([1, 20], 3),
    ):
        got = run(pieces, sizes, ranks)
        where = f"flat_pieces({sizes}, {ranks})"
        if not isinstance(got, list | tuple) or len(got) != ranks:
            wrong(f"{where} must return one list for each of the {ranks} ranks, empty ones too")
        found = [[tuple(int(n) for n in piece) for piece in mine] for mine in got]
        right = right_pieces(sizes, balanced(sum(sizes), ranks))
        if found == right:
            continue
        if any(start >= stop for mine in found for _, start, stop in mine):
            wrong(f"{where}: a piece without elements is in the list; leave out what a rank owns nothing of")
        held = [np.zeros(size, int) for size in sizes]
        for mine in found:
            for i, start, stop in mine:
                if not (0 <= i < len(sizes) and start >= 0 and stop <= sizes[i]):
                    wrong(
                        f"{where}: piece {(i, start, stop)} reaches outside parameter {i}: start and stop are"
                        " counted within the parameter, not along the line"
                    )
                held[i][start:stop] += 1
        counts = [sum(stop - start for _, start, stop in mine) for mine in found]
        for i, times in enumerate(held):
            if (times > 1).any():
                wrong(f"{where}: element {int(np.argmax(times > 1))} of parameter {i} has two owners")
            if (times == 0).any():
                wrong(
                    f"{where}: element {int(np.argmax(times == 0))} of parameter {i} has no owner: when the ranks"
                    " do not divide the number of elements the remainder must go somewhere"
                )
        if any(len({i for i, _, _ in mine}) < len(mine) for mine in found) or counts == balanced(
            sum(sizes), ranks
        ):
            wrong(f"{where}: the ranges are not contiguous along the line; expected {right}")
        if found == right_pieces(sizes, counts):
            wrong(
                f"{where}: the ranges have {counts} elements, balanced gives {balanced(sum(sizes), ranks)}:"
                " lengths differ by one at most, the longer ranges first",
                points=1,
            )
        wrong(
            f"{where} gives the ranks {counts} elements; the whole line is cut, not each parameter by itself"
        )


# --- zero1_step ---------------------------------------------------------------------------------------------


@lesson.probe
def zero1(
    submission: Any, weights: Array, gradients: Array, momenta: list[Array], lr: float, beta: float
) -> Any:
    def one_rank() -> Any:
        comm = minipar.world()
        w, g, v = weights.copy(), gradients[comm.rank].copy(), momenta[comm.rank].copy()
        new, momentum = submission.zero1_step(comm, w, g, v, lr, beta)
        unchanged = [
            np.array_equal(a, b)
            for a, b in ((w, weights), (g, gradients[comm.rank]), (v, momenta[comm.rank]))
        ]
        return new, momentum, calls_of(comm), unchanged

    return minipar.launch(one_rank, ranks=len(gradients), timeout=5)


def momentum_step(w: Array, v: Array, lr: float, beta: float, total: Array) -> tuple[Array, Array]:
    """Return the whole step's new weights and momentum."""
    new = beta * v + total
    return w - lr * new, new


@lesson.check("ZeRO 1: a step with the momentum of one range equals the whole step", points=4)
def check_zero1(run: Run) -> None:
    rng = np.random.default_rng(62)
    for n, ranks in ((12, 3), (10, 4)):
        w, g, v = rng.normal(size=n), rng.normal(size=(ranks, n)), rng.normal(size=n)
        cut = ranges(n, ranks)
        lr, beta = 0.05, 0.9
        step = functools.partial(momentum_step, w, v, lr, beta)
        got = run(zero1, w, g, [v[s] for s in cut], lr, beta)
        for rank, (_, momentum, _, unchanged) in enumerate(got):
            for name, kept in zip(("weights", "gradient", "momentum"), unchanged):
                if not kept:
                    wrong(f"zero1_step changed its argument {name} in place: compute new arrays")
            shaped(momentum, (balanced(n, ranks)[rank],), np.float64, f"the momentum of rank {rank}")
        weights = [
            shaped(new, (n,), np.float64, f"the weights of rank {r}") for r, (new, *_) in enumerate(got)
        ]
        same_everywhere(weights, "the weights")
        found = weights[0], np.concatenate([momentum for _, momentum, *_ in got])

        if close(found, step(g.sum(axis=0))):
            continue
        if close(found, step(g.mean(axis=0))):
            wrong(
                f"the gradient is {ranks} times too small: it was averaged over ranks, but each rank's is already"
                " its share of the whole batch's, so they are summed",
                points=1,
            )
        if close(found[0], w - lr * g.sum(axis=0)):
            wrong("the weights moved by lr · g: the step is along the momentum, beta v + g")
        own = np.concatenate([g[r][s] for r, s in enumerate(cut)])
        if close(found, step(own)):
            wrong(
                "each range was updated with its owner's gradient alone: the other ranks' samples were lost"
            )
        if close(found[0], step(g.sum(axis=0))[0]):
            wrong("the weights are right, but not the momentum returned: was the old one returned?", points=2)
        if close(found[1], step(g.sum(axis=0))[1]):
            wrong(
                "the momentum is right, but not the weights: w - lr v, each rank on its own range of w",
                points=2,
            )
        wrong(
            "neither weights nor momentum equal the whole step: after the reduce-scatter rank r has the sum for"
            " elements sum(counts[:r]) and on; is that the range of the weights that was updated?"
        )


@lesson.check("ZeRO 1: one reduce-scatter and one all-gather, nothing else", points=2)
def check_zero1_traffic(run: Run) -> None:
    n, ranks = 12, 3
    rng = np.random.default_rng(63)
    v = [rng.normal(size=s.stop - s.start) for s in ranges(n, ranks)]
    got = run(zero1, rng.normal(size=n), rng.normal(size=(ranks, n)), v, 0.1, 0.5)
    calls = got[0][2]
    if total(calls, "reduce_scatter") == total(calls, "all_gather") == (1, n) and len(calls) == 2:
        return
    if total(calls, "all_reduce")[1] >= n:
        wrong(
            f"the ledger shows {told(calls)}: the all-reduce gives every rank the whole sum, of which it needs one"
            " range; reduce_scatter gives that for half the traffic"
        )
    wrong(
        f"the ledger shows {told(calls) or 'nothing'}; expected are one reduce_scatter and one all_gather of {n}"
        " elements each, so that the step costs what an all-reduce of gradients costs"
    )


# --- zero3_linear -------------------------------------------------------------------------------------------


@lesson.probe
def zero3(submission: Any, weight: Array, xs: list[Array], gs: list[Array]) -> Any:
    ranks = len(xs)

    def one_rank() -> Any:
        comm = minipar.world()
        own = weight.reshape(-1)[ranges(weight.size, ranks)[comm.rank]].copy()
        y, backward = submission.zero3_linear(comm, own, weight.shape, xs[comm.rank].copy())
        forward_calls = calls_of(comm)
        own[...] = own + 1  # the weights as backward finds them: has it looked again?
        stale = backward(gs[comm.rank].copy())
        return y, stale, forward_calls, calls_of(comm)

    return minipar.launch(one_rank, ranks=ranks, timeout=5)


@lesson.check("ZeRO 3: forward and backward of a linear layer that lies in ranges", points=4)
def check_zero3(run: Run) -> None:
    rng = np.random.default_rng(64)
    for out, width, ranks in ((4, 3, 2), (3, 5, 4)):
        w = rng.normal(size=(out, width))
        xs = [rng.normal(size=(2 + r % 2, width)) for r in range(ranks)]
        gs = [rng.normal(size=(len(x), out)) for x in xs]
        got = run(zero3, w, xs, gs)
        grad = sum(g.T @ x for g, x in zip(gs, xs))
        for r, (y, (dx, dw), *_) in enumerate(got):
            cut = ranges(w.size, ranks)[r]
            y = shaped(y, (len(xs[r]), out), np.float64, f"y of rank {r}")
            dx = shaped(dx, xs[r].shape, np.float64, f"dx of rank {r}")
            dw = shaped(dw, (cut.stop - cut.start,), np.float64, f"the own gradient of rank {r}")
            if not close(y, xs[r] @ w.T):
                wrong(
                    f"y of rank {r} is not x Wᵀ: is the gathered line in memory order, reshaped to (out, in)?"
                )
            if close(dw, grad.reshape(-1)[cut] / ranks):
                wrong(
                    "the weight's gradient is averaged over the ranks: it is summed, as everywhere", points=1
                )
            if close(dw, (gs[r].T @ xs[r]).reshape(-1)[cut]):
                wrong(f"rank {r} returned its own samples' gradient: the sum over ranks is missing", points=1)
            if close(dw, grad.T.reshape(-1)[cut]):
                wrong("the weight's gradient is transposed: gᵀ x has the shape (out, in) of W", points=1)
            if not close(dw, grad.reshape(-1)[cut]):
                wrong(f"the own gradient of rank {r} is not its range of the sum of gᵀ x over the ranks")
            if not close(dx, gs[r] @ (w + 1)) and not close(dx, gs[r] @ w):
                wrong(
                    f"dx of rank {r} is not g W; each rank's samples are its own, so dx is not summed",
                    points=2,
                )


@lesson.check("ZeRO 3: the whole weight is gathered twice and kept by nobody", points=2)
def check_zero3_memory(run: Run) -> None:
    rng = np.random.default_rng(65)
    w, ranks = rng.normal(size=(3, 4)), 3
    gs = [rng.normal(size=(2, 3)) for _ in range(ranks)]
    got = run(zero3, w, [rng.normal(size=(2, 4)) for _ in range(ranks)], gs)
    dx, forward, after = got[0][1][0], got[0][2], got[0][3]
    if total(forward, "all_gather") != (1, w.size):
        wrong(f"forward should gather the weight once, {w.size} elements; the ledger shows {told(forward)}")
    if total(after, "all_gather")[0] == 1:
        wrong(
            "backward did not gather: the whole weight was kept since forward, so all layers' weights are whole at"
            " the end of forward, which is the memory of stage 2. Let it go, and gather it again"
        )
    if total(after, "all_reduce")[1] >= w.size:
        wrong("the gradient was all-reduced: a rank needs its own range of the sum, so reduce_scatter it")
    if total(after, "all_gather") != (2, 2 * w.size) or total(after, "reduce_scatter") != (1, w.size):
        wrong(
            f"two all-gathers and one reduce-scatter of {w.size} elements make 3Ψ; the ledger shows {told(after)}"
        )
    if close(dx, gs[0] @ w):
        wrong(
            "the values in `own` changed between forward and backward, and backward gathered those of before: capture"
            " `own` itself, not a copy of it"
        )
    if not close(dx, gs[0] @ (w + 1)):
        wrong("backward gathered the weight, but dx is not g W; see the check before this one")


# --- clipped_step -------------------------------------------------------------------------------------------


@lesson.probe
def clipped(submission: Any, weights: Array, gradients: Array, lr: float, max_norm: float) -> Any:
    def one_rank() -> Any:
        comm = minipar.world()
        new = submission.clipped_step(comm, weights.copy(), gradients[comm.rank].copy(), lr, max_norm)
        return new, calls_of(comm)

    return minipar.launch(one_rank, ranks=len(gradients), timeout=5)


@lesson.check("the bug hunt: a clipped step on four ranks equals the step on one", points=4)
def check_clipped(run: Run) -> None:
    rng = np.random.default_rng(66)
    n, ranks, lr = 10, 4, 0.1
    w, g = rng.normal(size=n), rng.normal(size=(ranks, n)) * np.geomspace(0.5, 8, n)
    whole, cut = g.sum(axis=0), ranges(n, ranks)
    norm = float(np.linalg.norm(whole))
    own = [float(np.linalg.norm(whole[s])) for s in cut]
    for max_norm in (norm / 3, norm * 3):
        got = run(clipped, w, g, lr, max_norm)
        weights = [
            shaped(new, (n,), np.float64, f"the weights of rank {r}") for r, (new, _) in enumerate(got)
        ]
        same_everywhere(weights, "the weights")
        new, calls = weights[0], got[0][1]

        def step(norms: list[float], limit: float = max_norm) -> Array:
            scales = [min(1.0, limit / x) for x in norms]
            return w - lr * np.concatenate([scale * whole[s] for scale, s in zip(scales, cut)])

        if close(new, step([norm] * ranks)):
            if total(calls, "all_reduce")[1] > 2 * ranks or total(calls, "all_gather")[1] > n + ranks:
                wrong(
                    f"the result is right, but the whole gradient was sent for it ({told(calls)}): each rank's sum"
                    " of squares is enough, a single number",
                    points=2,
                )
            continue
        if close(new, step(own)):
            wrong(
                "each rank clips by the norm of its own range, so ranges are scaled by different factors and the"
                " step points elsewhere: the norm is the whole gradient's, over all ranges"
            )
        if close(new, step([sum(own)] * ranks)):
            wrong(
                "the ranks' norms were added: norms do not add, their squares do; sum the squares, then the root",
                1,
            )
        if close(new, step([max(own)] * ranks)):
            wrong(
                "the largest of the ranks' norms was taken: the whole norm is the root of the sum of squares",
                1,
            )
        if close(new, step([norm**2] * ranks)):
            wrong("the gradient was divided by the sum of squares: the root is missing", 1)
        if close(new, w - lr * whole):
            wrong("nothing was clipped at all: the scale is min(1, max_norm / norm)")
        if close(new, w - lr * whole * max_norm / norm):
            wrong("a gradient shorter than max_norm was lengthened: the scale is at most 1", 1)
        local = math.sqrt(sum(float(np.sum(x**2)) for x in g))
        if close(new, step([local] * ranks)):
            wrong("the norm was taken of the ranks' gradients before they were summed; clip the sum", 1)
        wrong(
            "the new weights are not w - lr g · min(1, max_norm / ‖g‖), with ‖g‖ of the whole sum of gradients"
        )
