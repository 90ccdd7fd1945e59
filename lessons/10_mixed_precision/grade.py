"""Lesson 10, grading: each answer is compared with the right one, and with those of well-known mistakes."""

import numpy as np

import minipar
from minipar.errors import CommunicationError
from minipar.grading import Lesson, Run, close, shaped, wrong

lesson = Lesson(10)
SMALLEST_NORMAL, SMALLEST = 2.0**-14, 2.0**-24


def quiet():
    """Return a context without NumPy's warnings: overflow is what this lesson is about."""
    return np.errstate(over="ignore", under="ignore", invalid="ignore")


# What runs beside the submission ------------------------------------------------------------------------------


@lesson.probe
def share(submission, g, scale):
    before = g.copy()
    with quiet():
        answer = submission.lost_share(g, scale)
    return {"answer": answer, "changed": not np.array_equal(g, before)}


@lesson.probe
def trace(submission, found, options):
    scaler = submission.LossScale(**options)
    scales = [float(scaler.scale)]
    for overflowed in found:
        scaler.update(bool(overflowed))
        scales.append(float(scaler.scale))
    return scales


@lesson.probe
def add(submission, parts):
    def one_rank():
        comm = minipar.world()
        mine = parts[comm.rank].copy()
        with quiet():
            total = submission.sum_gradients(comm, mine)
        return {"total": total, "changed": not np.array_equal(mine, parts[comm.rank])}

    return minipar.launch(one_rank, ranks=len(parts), timeout=5)


@lesson.probe
def agree(submission, lists):
    def one_rank():
        comm = minipar.world()
        with quiet():
            answer = submission.any_overflow(comm, lists[comm.rank])
        return {"answer": bool(answer), "calls": comm.ledger.calls(), "elements": comm.ledger.elements()}

    try:
        return {"ranks": minipar.launch(one_rank, ranks=len(lists), timeout=5)}
    except CommunicationError as error:
        return {"stuck": str(error)}


class RightScale:
    """A loss scale for `mixed_step`, so that a mistake in the submission's own counts only once."""

    def __init__(self, init, interval):
        self.scale, self.good, self.interval, self.updates = float(init), 0, interval, 0

    def update(self, overflowed):
        self.updates += 1
        self.good = 0 if overflowed else self.good + 1
        if overflowed:
            self.scale *= 0.5
        elif self.good == self.interval:
            self.scale, self.good = self.scale * 2, 0


def part_of_gradient(weights, target, scale, broken):
    """Return one rank's float16 gradient of scale · 2^-12 · ½ |w - target|²; infinite somewhere if broken."""
    with quiet():
        g = (np.float32(scale * 2.0**-12) * (weights.astype(np.float32) - target)).astype(np.float16)
    if broken:
        g[1] = np.inf
    return g


@lesson.probe
def train(submission, master, targets, broken, options):
    def one_rank():
        comm = minipar.world()
        weights, moment = master.copy(), np.zeros_like(master)
        scaler, seen = RightScale(options["scale"], options["interval"]), []
        history = []
        for step in range(len(broken)):

            def gradient_of(half, scale, step=step):
                seen.append((str(half.dtype), float(scale)))
                return part_of_gradient(half, targets[comm.rank], scale, broken[step] == comm.rank)

            before = weights.copy(), moment.copy()
            with quiet():
                out = submission.mixed_step(
                    comm, weights, moment, gradient_of, scaler, options["lr"], options["momentum"], options["max_norm"]
                )
            changed = any(not np.array_equal(x, b, equal_nan=True) for x, b in zip((weights, moment), before))
            weights, moment = out
            history.append((np.asarray(weights).copy(), np.asarray(moment).copy(), scaler.scale))
            if changed:
                return {"changed": step}
        return {"history": history, "seen": seen, "updates": scaler.updates}

    return minipar.launch(one_rank, ranks=len(targets), timeout=5)


@lesson.probe
def accumulate(submission, weights, pieces, scale):
    def gradient_of(weights, piece, scale):
        return (np.float32(scale) * piece).astype(np.float16)

    with quiet():
        gradient, overflowed = submission.accumulated_gradient(weights, pieces, gradient_of, scale)
    return {"gradient": gradient, "overflowed": bool(overflowed)}


# What judges ----------------------------------------------------------------------------------------------------


@lesson.check("the share of a gradient that float16 loses", points=3)
def check_share(run: Run):
    rng = np.random.default_rng(10)
    for scale in (1.0, 2.0**10, 2.0**20):
        g = (rng.choice([-1, 1], 400) * 2.0 ** rng.uniform(-36, 6, 400)).astype(np.float32)
        g[::5] = 0
        found = run(share, g, scale)
        if found["changed"]:
            wrong("lost_share changes the gradient it is given; multiply into a new array")
        got = found["answer"]
        if not isinstance(got, list | tuple) or len(got) != 2 or any(np.ndim(x) or isinstance(x, str) for x in got):
            wrong(f"lost_share must return two numbers, (vanish, overflow); it returned {got!r:.60}")
        with quiet():
            scaled = g * np.float32(scale)
            half = scaled.astype(np.float16)
            late = (g.astype(np.float16) * np.float16(min(scale, 65504.0))).astype(np.float16)
        there, n = g != 0, int((g != 0).sum())
        overflow = float(np.isinf(half).sum() / n)
        right = (float((half[there] == 0).sum() / n), overflow)
        if close(got, right, 1e-9):
            continue
        if close(got, right[::-1], 1e-9):
            wrong("lost_share: the two shares are exchanged; vanish comes first")
        if close(got[0], float((half == 0).sum() / g.size), 1e-9):
            wrong("lost_share: the zeros of g count as lost; only elements that were not zero can vanish", 1)
        if close(got[0], float((there & (np.abs(scaled) < SMALLEST_NORMAL)).sum() / n), 1e-9):
            wrong(
                "lost_share: numbers below 2^-14 count as lost. They are subnormal: fewer bits, but not zero, down"
                " to 2^-24",
                points=1,
            )
        if close(got[0], float((there & (np.abs(scaled) < SMALLEST)).sum() / n), 1e-9):
            wrong(
                "lost_share: everything below 2^-24 counts as lost. float16 rounds to the nearest number, so what lies"
                " above 2^-25 becomes 2^-24; let the cast decide",
                points=2,
            )
        if close(got[0], float((late[there] == 0).sum() / n), 1e-9) and scale > 1:
            wrong(
                "lost_share: the gradient was rounded to float16 first and scaled then; what has vanished does not come"
                " back. Scale in float32, round last",
                points=1,
            )
        if close(got[1], float((np.abs(scaled) >= 2.0**15).sum() / n), 1e-9) and got[1] != overflow:
            wrong("lost_share: float16 reaches up to 65504, just below 2^16", points=1)
        wrong(
            f"lost_share at scale {scale:g}: expected ({right[0]:.4f}, {right[1]:.4f}) of the {n} elements that are not"
            f" zero, got ({float(got[0]):.4f}, {float(got[1]):.4f})"
        )


def scale_trace(found, init=2.0**16, growth=2.0, backoff=0.5, interval=2000, floor=1.0, mistake=""):
    """Return the scale before the first and after every step, right or with a mistake."""
    scale, good, scales = float(init), 0, [float(init)]
    for overflowed in found:
        if overflowed:
            scale = scale * backoff if mistake == "no floor" else max(scale * backoff, floor)
            good = {"count survives": good, "skips count": good + 1}.get(mistake, 0)
            if mistake == "skips count" and good >= interval:
                good = 0
        else:
            good += 1
            if good == interval + (mistake == "off by one") or (good > interval and mistake == "never reset"):
                scale *= growth
                good = good if mistake == "never reset" else 0
        scales.append(scale)
    return scales


SCALE_MISTAKES = {
    "no floor": "the scale falls below its floor",
    "count survives": "an overflow leaves the count of good steps as it was; the interval begins anew after it, or the"
    " scale grows back into the overflow at once",
    "skips count": "skipped steps are counted as good ones",
    "never reset": "after the first growth the scale grows at every step; the count begins anew when the scale grows",
    "off by one": "the scale grows one step late: it does so with the interval-th good step, not after it",
}


@lesson.check("the loss scale grows and backs off", points=4)
def check_scale(run: Run):
    often = (np.random.default_rng(11).random(60) < 0.2).astype(int).tolist()
    cases = [
        ([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0], dict(interval=3)),
        ([0, 0, 1, 0, 0, 0, 1, 0, 0], dict(init=1024.0, interval=3)),
        ([1] * 6 + [0] * 4, dict(init=16.0, interval=2, floor=4.0)),
        (often, dict(init=256.0, growth=4.0, backoff=0.25, interval=4, floor=2.0)),
        ([1, 0, 1], {}),
    ]
    for found, options in cases:
        got, right = run(trace, found, options), scale_trace(found, **options)
        if close(got, right, 1e-12):
            continue
        for mistake, text in SCALE_MISTAKES.items():
            traced = scale_trace(found, **options, mistake=mistake)
            if traced != right and close(got, traced, 1e-12):
                wrong(f"LossScale({options}): {text}")
        step = next(i for i, (a, b) in enumerate(zip(got, right)) if a != b)
        if step == 0:
            wrong(f"LossScale({options}): at first the scale should be {right[0]:g}, it is {got[0]:g}; keep `init`")
        wrong(
            f"LossScale({options}): after {[bool(f) for f in found[:step]]} the scale should be {right[step]:g}, it is"
            f" {got[step]:g}; is the scale changed by the factors given, and the count set to 0 after each change?"
        )


@lesson.check("gradients are added up in float32", points=2)
def check_sum(run: Run):
    rng = np.random.default_rng(12)
    cases = (
        ("four ranks of 40000", [np.full(3, 40000, np.float16)] * 4),
        ("2048, and three ranks of 1", [np.full(2, n, np.float16) for n in (2048, 1, 1, 1)]),
        ("random numbers", [rng.standard_normal(8).astype(np.float16) for _ in range(4)]),
    )
    for name, parts in cases:
        right = np.sum([p.astype(np.float32) for p in parts], axis=0)
        for rank, found in enumerate(run(add, parts)):
            if found["changed"]:
                wrong("sum_gradients changes the array that it is given")
            got = found["total"]
            with quiet():
                low = sum(parts[1:], start=parts[0])
            if close(got, low, 1e-3) and not close(got, right, 1e-6):
                wrong(
                    f"sum_gradients of {name}: the sum was made in float16, where it overflows or swallows the small"
                    " ones; casting its result comes too late. Cast before the all-reduce"
                )
            if close(got, right / len(parts), 1e-6):
                wrong("sum_gradients returns the mean; the parts of a gradient add up (lesson 04)")
            if close(got, parts[rank], 1e-6):
                wrong("sum_gradients returns this rank's own gradient; use what all_reduce returns")
            got = shaped(got, right.shape, np.float32, "sum_gradients")
            if not close(got, right, 1e-6):
                wrong(f"sum_gradients of {name}: expected {right}, got {got} on rank {rank}")


INF, BIG = np.float32(np.inf), np.float32(3e38)


def overflow_cases():
    """Return (name, each rank's list of gradients, whether any overflowed)."""

    def a(*numbers):
        return np.array(numbers, np.float32)

    fine = a(1, -2, 3)
    return (
        ("nothing", [[fine], [fine, a(0)], [a(5)]], False),
        ("an infinity on rank 2", [[fine], [fine, fine], [fine, a(1, INF)]], True),
        ("a NaN on rank 0", [[a(np.nan, 1)], [fine], [fine]], True),
        ("an empty list on rank 1", [[fine], [], [a(7)]], False),
        ("a minus infinity on rank 1, nothing on rank 0", [[], [a(-np.inf)], [fine]], True),
        ("finite numbers of 3e38", [[a(BIG, BIG)], [a(BIG)], [fine]], False),
    )


@lesson.check("one rank's overflow is every rank's", points=4)
def check_agree(run: Run):
    told = []  # what each rank was told of, by case
    for name, lists, right in overflow_cases():
        found = run(agree, lists)
        if "stuck" in found:
            wrong(
                f"any_overflow with {name}: a rank returned without the all-reduce, and the others wait for it for"
                f" ever. A rank that has found something, or holds nothing, must take part too ({found['stuck']:.160})"
            )
        got = [rank["answer"] for rank in found["ranks"]]
        told += [(rank["calls"], rank["elements"]) for rank in found["ranks"]]
        if got == [right] * len(lists):
            continue
        if got == [any(not np.isfinite(g).all() for g in mine) for mine in lists]:
            wrong(
                f"any_overflow with {name}: each rank answers for itself, {got}. Some would skip and some step, and"
                " the replicas would differ from then on; make it one answer with an all-reduce",
                points=1,
            )
        if name.startswith("finite"):
            wrong("any_overflow takes 3e38 for an overflow: sums and norms of large numbers overflow themselves;"
                  " ask np.isfinite of every element", points=2)  # fmt: skip
        if name.startswith("a NaN"):
            wrong("any_overflow does not see a NaN; inf - inf and 0 · inf make them: ask for what is not finite", 2)
        if name.startswith("a minus"):
            wrong("any_overflow does not see a minus infinity; ask for what is not finite", 2)
        wrong(f"any_overflow with {name}: expected {right} on every rank, got {got}")
    for calls, elements in told:
        if (calls, elements) != (1, 1):
            wrong(
                f"any_overflow made {calls} calls on {elements} elements; one all-reduce of one number tells all that"
                " needs to be known",
                points=2,
            )


OPTIONS = {"scale": 2.0**12, "interval": 2, "lr": 0.05, "momentum": 0.9}
BROKEN = [-1, -1, -1, 1, -1, -1]  # the rank whose gradient overflows, step by step


def history_of(master, targets, options, mistake=""):
    """Return [rank][step] = (master, moment, scale) of `mixed_step`, right or with a mistake."""
    lr, momentum, max_norm = (np.float32(options[name]) for name in ("lr", "momentum", "max_norm"))
    ranks = range(len(targets))
    weights, moments = [master.copy() for _ in ranks], [np.zeros_like(master) for _ in ranks]
    scalers, out = [RightScale(options["scale"], options["interval"]) for _ in ranks], [[] for _ in ranks]
    for broken in BROKEN:
        scales = [scaler.scale for scaler in scalers]
        with quiet():
            parts = [
                part_of_gradient(weights[r].astype(np.float16), targets[r], scales[r], broken == r) for r in ranks
            ]
            whole = np.sum([part.astype(np.float32) for part in parts], axis=0)
            if mistake == "half sum":
                whole = sum(parts[1:], start=parts[0]).astype(np.float32)
            if mistake == "mean":
                whole = whole / np.float32(len(ranks))
            for r in ranks:
                overflowed = not np.isfinite(parts[r] if mistake == "alone" else whole).all()
                if mistake == "update first":
                    scalers[r].update(overflowed)
                g, scale = whole, np.float32(scalers[r].scale)
                if mistake == "clip first":
                    g = g * np.float32(min(1.0, max_norm / np.linalg.norm(g)))
                g = g if mistake == "not unscaled" else g / scale
                norm = float(np.linalg.norm(g.astype(np.float64)))
                if norm > max_norm and mistake not in ("clip first", "no clip"):
                    g = g * np.float32(max_norm / norm)
                skip = overflowed and mistake != "never skips"
                if skip and mistake == "zeros":
                    g, skip = np.zeros_like(g), False
                if not skip:
                    moments[r] = momentum * moments[r] + g
                    weights[r] = weights[r] - lr * moments[r]
                if mistake == "half master":
                    weights[r] = weights[r].astype(np.float16).astype(np.float32)
                if mistake != "update first":
                    scalers[r].update(overflowed)
                out[r].append((weights[r], moments[r], scalers[r].scale))
    return out


STEP_MISTAKES = {
    "half sum": "the ranks' gradients were added up in float16, which swallows small ones and overflows where each"
    " alone did not; cast to float32 before the all-reduce",
    "not unscaled": "the gradient still has the loss scale in it when the step is taken; divide the sum by the scale",
    "clip first": "the gradient is clipped before it is unscaled. Its norm is then `scale` times too large, nearly"
    " everything is clipped, and training crawls: unscale first",
    "no clip": "the gradient is not clipped; its norm over all elements, unscaled, may be max_norm at most",
    "mean": "the sum over ranks was divided by their number; the parts add up already",
    "zeros": "an overflowed gradient is replaced by zeros and the step taken: the moment decays and the weights move."
    " A skipped step changes neither",
    "never skips": "a step with an infinite gradient is taken; weights and moment are lost for good. Return them as"
    " they were",
    "alone": "each rank looks at its own gradient: one skips and the others step, so the replicas differ. Look at the"
    " sum, which is infinite on all, or agree",
    "half master": "the weights are kept in float16: beside a weight of 100 a step of 0.01 is rounded away. Keep the"
    " float32 ones, and round a copy for each forward",
    "update first": "the scale is updated before the gradient is unscaled, so that it is divided by another scale than"
    " the one it was multiplied by",
}


@lesson.check("a step in mixed precision", points=5)
def check_step(run: Run):
    for max_norm in (1e6, 0.04):  # which never clips, and always
        judge_step(run, {**OPTIONS, "max_norm": max_norm})


def judge_step(run, options):
    rng = np.random.default_rng(13)
    master = (100 * rng.standard_normal(6)).astype(np.float32)
    targets = [(100 * rng.standard_normal(6)).astype(np.float32) for _ in range(3)]
    found = run(train, master, targets, BROKEN, options)
    for rank in found:
        if "changed" in rank:
            wrong("mixed_step changes master or moment in place; return new arrays", points=3)
    if not found[0]["seen"]:
        wrong("mixed_step never called gradient_of; the gradient comes from there")
    dtypes = {dtype for rank in found for dtype, _ in rank["seen"]}
    if dtypes != {"float16"}:
        wrong(f"mixed_step: gradient_of was given {' and '.join(sorted(dtypes))} weights; the master weights are for"
              " the optimizer, forward and backward get a float16 copy", points=2)  # fmt: skip
    if len(found[0]["seen"]) != len(BROKEN):
        times = len(found[0]["seen"])
        wrong(f"mixed_step called gradient_of {times} times in {len(BROKEN)} steps; once in each will do")
    right = history_of(master, targets, options)
    got = [[tuple(step) for step in rank["history"]] for rank in found]
    if close(got, right, 1e-5):
        return
    for mistake, text in STEP_MISTAKES.items():
        if close(got, history_of(master, targets, options, mistake), 1e-5):
            wrong(f"mixed_step: {text}", points=1)
    if any(rank["updates"] != len(BROKEN) for rank in found):
        wrong("mixed_step must call loss_scale.update once in every step, skipped ones included", points=2)
    scales = [[step[2] for step in rank] for rank in got]
    if scales != [[step[2] for step in rank] for rank in right]:
        wrong(f"mixed_step: the loss scale went {scales[0]}, not {[s[2] for s in right[0]]}; what is `update` told?", 1)
    s = next(s for s in range(len(BROKEN)) if not close([r[s] for r in got], [r[s] for r in right], 1e-5))
    why = "the step to be skipped" if BROKEN[s] >= 0 else f"step {s + 1}"
    part = "master" if not close([r[s][0] for r in got], [r[s][0] for r in right], 1e-5) else "moment"
    for r in range(len(targets)):
        for name, array in zip(("master", "moment"), got[r][s]):
            shaped(array, master.shape, np.float32, f"mixed_step's {name}")
    wrong(f"mixed_step: the {part} is wrong from {why} on: expected {right[0][s][part == 'moment']}, got"
          f" {got[0][s][part == 'moment']}; go through the order in the docstring")  # fmt: skip


@lesson.check("the bug hunt: the gradient of 4096 pieces", points=2)
def check_hunt(run: Run):
    rng = np.random.default_rng(14)
    weights = np.zeros(3, np.float16)
    cases = (
        ("2 pieces", rng.standard_normal((2, 3)), 1024.0, False),
        ("64 pieces", 1 + rng.random((64, 3)), 256.0, False),
        ("4096 pieces", 0.01 + 0.01 * rng.random((4096, 3)), 1024.0, False),
        ("64 pieces, whose sum is beyond 65504", np.full((64, 3), 2.0), 4096.0, False),
        ("an infinite piece", np.array([[1.0, 2, 3], [1e9, 2, 3], [1, 2, 3]]), 64.0, True),
    )
    for name, pieces, scale, overflowed in cases:
        with quiet():
            halves = [(np.float32(scale) * p).astype(np.float16) for p in pieces]
            right = np.sum(halves, axis=0, dtype=np.float32) / np.float32(scale)
            low = np.zeros(3, np.float16)
            for half in halves:
                low += half
        found = run(accumulate, weights, list(pieces), scale)
        got = found["gradient"]
        if close(got, low.astype(np.float32) / np.float32(scale), 1e-4) and not close(got, right, 1e-4):
            wrong(
                f"accumulated_gradient of {name} gives {got}, and {right} is right: the sum grows until the next piece"
                " is less than half its last bit. Which dtype does it have?"
            )
        if close(got, right / len(pieces), 1e-4) and len(pieces) > 1:
            wrong("accumulated_gradient divides by the number of pieces; their parts add up", points=1)
        got = shaped(got, (3,), np.float32, "accumulated_gradient")
        if not close(got, right, 1e-4):
            wrong(f"accumulated_gradient of {name}: expected {right}, got {got}; unscale once, after the sum")
        if found["overflowed"] != overflowed:
            wrong(f"accumulated_gradient of {name}: overflowed is {found['overflowed']}, it should be {overflowed}", 1)
