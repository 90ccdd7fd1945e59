"""Lesson 12, the grader: a rank's memory, a step's seconds, possible layouts, the choice, and a bubble misread."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import numpy as np

from minipar.grading import Lesson, Run, close, wrong

lesson = Lesson(12)
Numbers = dict[str, Any]
MODEL: Numbers = {
    "layers": 8, "heads": 6, "parameters": 1200, "activations": 700, "boundary": 48, "work": 6000, "batch": 24,
}  # fmt: skip
MACHINE: Numbers = {"speed": 1e6, "node": 4, "near": (1e-5, 3e-8), "far": (2e-3, 5e-6)}


def layout(dp: int, pp: int, tp: int, zero: int = 0, m: int = 1) -> Numbers:
    return {"dp": dp, "pp": pp, "tp": tp, "zero": zero, "microbatches": m}


def text(x: Numbers) -> str:
    words = f"dp {x['dp']} × pp {x['pp']} × tp {x['tp']}, ZeRO {x['zero']}"
    return f"{words}, {x['microbatches']} microbatch{'es' * (x['microbatches'] > 1)}"


@lesson.probe
def call(submission: Any, name: str, *arguments: Any) -> Any:
    try:
        return getattr(submission, name)(*arguments)
    except ValueError as error:
        if name == "choose":  # whose contract has one
            return {"refused": str(error)}
        raise


def judge(
    got: Any, name: str, right: float, known: list[tuple[float, str]], where: str, general: str, points: int = 0
) -> None:
    """End the check if got[name] is not right: with the misconception that gives it, if there is one."""
    if not isinstance(got, dict) or not isinstance(got.get(name), int | float | np.number):
        wrong(f"{where}a dict with a number {name!r} must be returned; it was {got!r:.80}")
    if close(got[name], right):
        return
    for value, misconception in known:
        if close(got[name], value):
            wrong(f"{where}{name!r} = {got[name]:g}: {misconception}", points)
    wrong(f"{where}{name!r} = {got[name]:g}, {right:g} was expected; {general}")


BYTES = {"parameters": (4, 3), "gradients": (4, 2), "optimizer": (8, 1)}  # an element's, and from which ZeRO stage on
CASES = [layout(4, 1, 1), layout(2, 1, 3), layout(1, 4, 1, 0, 3), layout(2, 2, 2, 1, 2), layout(4, 1, 2, 2, 3),
         layout(3, 1, 2, 3, 2), layout(1, 4, 1, 0, 12), layout(2, 4, 2, 1, 2), layout(2, 1, 1, 0, 4)]  # fmt: skip


@lesson.check("what a rank holds of parameters, gradients and optimizer state", points=3)
def check_state(run: Run) -> None:
    for x in CASES:
        got = run(call, "memory", MODEL, x)
        dp, pp, tp, zero = x["dp"], x["pp"], x["tp"], x["zero"]
        for kind, (size, stage) in BYTES.items():
            n, cut = size * MODEL["layers"] * MODEL["parameters"], dp if zero >= stage else 1
            right = n / pp / tp / cut
            known = [
                (right / dp, "data parallelism cuts the batch, not the model: every rank holds all of it, unless ZeRO"
                 f" divides it, and {kind} are divided from stage {stage} on"),
                (n / tp / cut, "all blocks are counted; a stage of the pipeline holds layers / pp of them"),
                (n / pp / cut, "blocks are counted whole; tensor parallelism cuts each over tp ranks"),
                (n / cut, "the whole model's; a stage holds layers / pp of the blocks, and tp cuts each"),
                (right / size, "these are elements; a float32 takes 4 bytes"),
            ]
            if kind == "optimizer":
                known.insert(0, (right / 2, "one moment is counted; Adam keeps two float32 numbers for each parameter"))
            if zero >= stage:
                known.insert(0, (right * dp, f"ZeRO {zero} divides {kind} over the dp ranks, from stage {stage} on"))
                known.insert(0, (right / pp / tp, "ZeRO divides over the dp ranks only: the others hold other parts"))
            general = "which axes divide the blocks, and which ZeRO stage divides this over the dp ranks?"
            judge(got, kind, right, known, f"memory, {text(x)}: ", general)


@lesson.check("what a rank holds of activations", points=2)
def check_activations(run: Run) -> None:
    for x in CASES:
        dp, pp, tp, m = x["dp"], x["pp"], x["tp"], x["microbatches"]
        one = MODEL["batch"] / dp / m * MODEL["layers"] / pp * MODEL["activations"] / tp  # of a microbatch
        live = min(m, pp)
        known = [
            (one, f"of one microbatch; 1F1B's first stage holds min(m, pp) = {live} of them before its first backward"),
            (m * one, "of all microbatches, as GPipe would hold; 1F1B holds min(m, pp) at once, and accumulation one"),
            (pp * one, f"pp microbatches; there are only {m}, so min(m, pp) are live"),
            (live * one * tp, "whole blocks'; tensor parallelism cuts a block's activations over tp ranks"),
            (live * one * dp, "the batch is not divided over the dp ranks: each takes batch / dp samples"),
            (live * one * m, "each live microbatch is counted as the rank's whole part; it is a microbatches-th of it"),
            (live * one * pp, "of all blocks; a stage has layers / pp"),
        ]
        general = "live microbatches × samples in each × blocks of the stage × bytes of a block's part"
        judge(run(call, "memory", MODEL, x), "activations", live * one, known, f"memory, {text(x)}: ", general)


STEPS = [layout(1, 1, 1, 0, 3), layout(2, 1, 1), layout(1, 1, 2, 0, 4), layout(1, 1, 6, 0, 2), layout(1, 4, 1, 0, 6),
         layout(3, 2, 2, 1, 4), layout(1, 4, 2, 0, 2), layout(2, 8, 3, 1, 12)]  # fmt: skip


def ring(n_bytes: float, ranks: int, link: tuple[float, float]) -> float:
    return (ranks - 1) * (link[0] + link[1] * n_bytes / ranks)


def link(ranks: int, distance: int, other: bool = False) -> tuple[float, float]:
    """Return a group's link; with `other` the other one."""
    found: tuple[float, float] = MACHINE["near" if (ranks * distance <= MACHINE["node"]) != other else "far"]
    return found


@lesson.check("computation, sums within blocks, and the pipeline's bubble", points=4)
def check_model_parallel(run: Run) -> None:
    for x in STEPS:
        dp, pp, tp, m = x["dp"], x["pp"], x["tp"], x["microbatches"]
        got, where = run(call, "step_seconds", MODEL, MACHINE, x), f"step_seconds, {text(x)}: "
        samples, blocks = MODEL["batch"] / dp / m, MODEL["layers"] / pp
        compute = m * samples * blocks * MODEL["work"] / tp / MACHINE["speed"]
        n = samples * MODEL["boundary"]
        known = [
            (compute / m, "one microbatch's; a step runs all of them"),
            (compute * m, "every microbatch is counted as the whole part of the batch; it has batch / dp / m samples"),
            (compute * dp, "the batch is divided over the dp ranks first"),
            (compute * tp, "tensor parallelism divides each block's work over tp ranks"),
            (compute * pp, "a stage works on layers / pp blocks; that all blocks are passed is the bubble's part"),
        ]
        general = "work × samples of this rank × blocks of this stage / tp / speed"
        judge(got, "compute", compute, known, where, general)
        one = 2 * ring(n, tp, link(tp, 1))
        tensor = m * blocks * 4 * one
        known = [
            (tensor / m, "one microbatch's sums; each microbatch is summed by itself"),
            (tensor / 2, "half of it: a block has four all-reduces, and each takes two ring passes"),
            (tensor * pp, "of all blocks; a rank has layers / pp"),
            (m * blocks * 4 * 2 * ring(n, tp, link(tp, 1, True)),
             "on the wrong link: tp ranks are neighbours in the numbering; do so many lie in a node?"),
            (blocks * 4 * 2 * ring(n * m, tp, link(tp, 1)), "microbatches are not summed together, each pays α"),
            (m * blocks * 4 * (link(tp, 1)[0] + link(tp, 1)[1] * n),
             "an all-reduce is no message: as a ring it takes 2 (N - 1) α + 2 β n (N - 1) / N"),
        ]  # fmt: skip
        general = "4 all-reduces × blocks of the stage × microbatches, each of samples × boundary bytes"
        judge(got, "tensor", tensor, known, where, general, 1)
        bubble = (pp - 1) * (compute + tensor) / m
        share = (pp - 1) / (m + pp - 1)
        known = [
            (0.0, "the bubble is forgotten: while the pipeline fills and drains, stages wait"),
            (share * (compute + tensor),
             "(p - 1) / (m + p - 1) is the bubble's share of the *whole* time. Of the useful time it is (p - 1) / m"),
            ((pp - 1) * compute / m, "while it fills, the pipeline also waits for the sums within blocks"),
            ((pp - 1) * (compute + tensor), "of pp - 1 whole steps; it is of pp - 1 *microbatches*"),
            (pp * (compute + tensor) / m, "pp - 1 microbatches, not pp: one stage alone has no bubble"),
        ]  # fmt: skip
        judge(got, "bubble", bubble, known, where, "(pp - 1) microbatches' compute and tensor seconds", 2)


DATA = [layout(1, 1, 2), layout(2, 1, 1, 0, 3), layout(4, 1, 1, 1, 2), layout(2, 2, 2, 1, 4), layout(3, 1, 2, 2, 4),
        layout(6, 1, 1, 3, 2), layout(2, 4, 1, 0, 3), layout(4, 1, 1, 2, 3), layout(2, 1, 2, 3, 3)]  # fmt: skip


@lesson.check("gradients over the data-parallel ranks, by ZeRO stage and link", points=3)
def check_data_parallel(run: Run) -> None:
    for x in DATA:
        dp, pp, tp, zero, m = (x[k] for k in ("dp", "pp", "tp", "zero", "microbatches"))
        whole = 4 * MODEL["layers"] * MODEL["parameters"]
        g, passes = whole / pp / tp, {0: 2, 1: 2, 2: m + 1, 3: 3 * m}[zero]
        path = link(dp, pp * tp)
        right = passes * ring(g, dp, path)
        known = [
            (passes * ring(whole, dp, path), "of the whole model; a rank sums the gradients of its own part only"),
            (passes * ring(g, dp, link(dp, 1)), "dp is the outermost axis: its ranks are pp × tp apart"),
            (passes * ring(g, dp, link(dp, pp * tp, True)), "on the wrong link: do dp × pp × tp ranks fit a node?"),
            (2 * ring(g, dp, path), f"two passes, as without ZeRO; ZeRO {zero} sums or gathers in every microbatch"),
            (3 * ring(g, dp, path), "right for one microbatch; ZeRO 3 gathers and sums again in each of them"),
            (m * 2 * ring(g, dp, path), "summed after every microbatch; below ZeRO 2 they are accumulated first"),
            (passes * ring(g / 4, dp, path), "bytes are meant, not elements: 4 for each gradient"),
            (passes / 2 * ring(g, dp, path), "half of it: an all-reduce is two passes"),
        ]  # fmt: skip
        general = "passes × ((N - 1) α + β g (N - 1) / N): which g, which N, which link?"
        got = run(call, "step_seconds", MODEL, MACHINE, x)
        judge(got, "data", right, known, f"step_seconds, {text(x)}: ", general, 1)


def is_whole(value: Any) -> bool:
    """Whether this is a whole number: an int, or NumPy's, which argmin and lexsort return; True is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def possible(model: Numbers, x: Numbers, ranks: int) -> str:
    """Return what rules a layout out, or nothing."""
    dp, pp, tp, zero, m = (x[k] for k in ("dp", "pp", "tp", "zero", "microbatches"))
    rules = [
        (min(dp, pp, tp, m) < 1 or dp * pp * tp != ranks, f"dp × pp × tp must be {ranks}, and no number below 1"),
        (model["heads"] % tp, f"tp = {tp} does not divide the {model['heads']} heads; a head cannot be cut"),
        (model["layers"] % pp, f"pp = {pp} does not divide the {model['layers']} layers"),
        (model["batch"] % dp, f"dp = {dp} does not divide the batch of {model['batch']}"),
        (model["batch"] // dp % m, f"{m} microbatches do not divide the {model['batch'] // dp} samples of a rank"),
        (zero and dp == 1, "ZeRO divides over data-parallel ranks, and there is one"),
        (zero > 1 and pp > 1, "ZeRO 2 and 3 would sum or gather in every microbatch of a pipeline"),
        (zero not in range(4), "ZeRO has stages 0 to 3"),
    ]  # fmt: skip
    return next((reason for bad, reason in rules if bad), "")


@lesson.check("every layout that is possible, and no other", points=4)
def check_layouts(run: Run) -> None:
    for model, ranks in ((MODEL, 8), (MODEL, 1), (MODEL, 12), ({**MODEL, "layers": 6, "heads": 4, "batch": 10}, 8)):
        got = run(call, "layouts", model, ranks)
        keys = ("dp", "pp", "tp", "zero", "microbatches")
        where = f"layouts, {ranks} rank{'s' * (ranks > 1)}: "
        for x in got:
            if not isinstance(x, dict) or set(x) != set(keys) or not all(is_whole(x[k]) for k in keys):
                wrong(f"{where}a layout is a dict of ints with the keys {', '.join(keys)}; there is {x!r:.80}")
            if reason := possible(model, x, ranks):
                wrong(f"{where}{text(x)} cannot be: {reason}", points=1)
        found = [tuple(x[k] for k in keys) for x in got]
        if len(set(found)) < len(found):
            wrong(f"{where}a layout is there more than once", points=2)
        sizes = range(1, max(ranks, model["batch"]) + 1)
        grids = [(d, p, ranks // d // p) for d in sizes if ranks % d == 0 for p in sizes if ranks // d % p == 0]
        all_of = [layout(*grid, zero, m) for grid in grids for zero in range(4) for m in sizes]
        for x in all_of:
            if possible(model, x, ranks) or tuple(x.values()) in found:
                continue
            hint = "go through all divisors, in all three places"
            if not any(f[:3] == (x["dp"], x["pp"], x["tp"]) for f in found):
                hint = "this grid is nowhere: are dp, pp and tp tried in every order, and not only powers of 2?"
            elif x["zero"] and not any(f[:4] == tuple(x.values())[:4] for f in found):
                hint = "this ZeRO stage is missing for this grid; with dp > 1 there are 0 to 3, in a pipeline 0 and 1"
            elif x["pp"] == 1 and x["microbatches"] > 1:
                hint = "without a pipeline microbatches are accumulated, which saves activations"
            wrong(f"{where}{text(x)} is missing; {hint}", points=1)


def candidate(state: float, kept: float, *parts: float) -> Numbers:
    names = ("compute", "tensor", "bubble", "data")
    held = {"parameters": state / 4, "gradients": state / 4, "optimizer": state / 2, "activations": kept}
    return {"memory": held, "seconds": dict(zip(names, parts))}


CANDIDATES = [
    candidate(64, 16, 8.0, 0.0, 0.0, 1.0),  # the fastest of all, and does not fit 48
    candidate(16, 8, 9.0, 2.0, 0.0, 0.5),  # 11.5
    candidate(32, 16, 8.5, 0.0, 1.75, 0.0),  # 10.25, fits 48 exactly: the best
    candidate(8, 8, 7.5, 5.0, 0.5, 0.25),  # 13.25, least computation
    candidate(16, 12, 8.5, 0.0, 0.0, 6.0),  # 14.5
    candidate(8, 4, 16.0, 0.0, 6.0, 0.0),  # 22: more seconds in compute, a larger ratio in the bubble
    candidate(32, 8, 8.5, 0.0, 4.0, 0.0),  # compute is its largest part, and as long as the best one's
]
CHOICES = [(CANDIDATES, 48), (CANDIDATES, 100), (CANDIDATES[3:], 24), ([CANDIDATES[i] for i in (2, 0, 4)], 40),
           ([candidate(40, 4, 2.0, 0.0, 0.0, 1.0), candidate(8, 4, 2.0, 1.0, 0.0, 0.0)], 60)]  # fmt: skip


def decide(candidates: list[Numbers], limit: float) -> tuple[int, list[str]]:
    need = [sum(c["memory"].values()) for c in candidates]
    took = [sum(c["seconds"].values()) for c in candidates]
    best = min((i for i, n in enumerate(need) if n <= limit), key=lambda i: (took[i], need[i]))
    mine, reasons = candidates[best]["seconds"], []
    for i, c in enumerate(candidates):
        out = need[i] > limit or took[i] == took[best]
        reasons.append("memory" if out else max(mine, key=lambda k: c["seconds"][k] - mine[k]))
    reasons[best] = "best"
    return best, reasons


def refuse_choice(got: int, candidates: list[Numbers], limit: float, best: int, where: str) -> NoReturn:
    need, took = ([sum(c[k].values()) for c in candidates] for k in ("memory", "seconds"))
    if need[got] > limit:
        wrong(f"{where} takes candidate {got}, which needs {need[got]:g} bytes: what does not fit cannot be run")
    if took[got] == took[best]:
        wrong(f"{where} takes candidate {got}; candidate {best} is as fast and holds less", points=2)
    below = [i for i, n in enumerate(need) if n < limit]
    if need[best] == limit and got == min(below, key=lambda i: took[i]):
        wrong(f"{where} leaves out candidate {best}, which needs just as much as there is: that is legal", points=1)
    compute = [c["seconds"]["compute"] for c in candidates]
    if compute[got] < compute[best]:
        wrong(f"{where} takes the candidate that computes least; a step is the sum of all four parts")
    both = f"candidate {got}, {took[got]:g} s a step; candidate {best} fits, too, and takes {took[best]:g} s"
    wrong(f"{where} takes {both}. Memory is a limit, the seconds decide")


@lesson.check("the choice, and why it is one", points=4)
def check_choose(run: Run) -> None:
    for candidates, limit in CHOICES:
        best, reasons = decide(candidates, limit)
        got = run(call, "choose", candidates, limit)
        where = f"choose of {len(candidates)} candidates, limit {limit},"
        if isinstance(got, dict):
            wrong(f"{where} raised ValueError ({got['refused']:.80}); candidate {best} fits")
        pair = isinstance(got, list | tuple) and len(got) == 2
        form = pair and is_whole(got[0]) and isinstance(got[1], list | tuple)
        if not form or not 0 <= got[0] < len(candidates) or len(got[1]) != len(candidates):
            wrong(f"{where} must return an index and a list of {len(candidates)} reasons; it returned {got!r:.80}")
        if got[0] != best:
            refuse_choice(got[0], candidates, limit, best, where)
        for i, (mine, right) in enumerate(zip(got[1], reasons)):
            if mine == right:
                continue
            at = f"{where} says {mine!r:.40} of candidate {i}, {right!r} was expected: "
            parts = candidates[i]["seconds"]
            if mine == max(parts, key=lambda k: parts[k]):
                wrong(at + "its largest part is no reason, the best may have as much of it", points=2)
            wrong(at + "the part in which it loses most *seconds* (no ratio) to the best, or memory", points=2)
    got = run(call, "choose", CANDIDATES, 11)
    if not isinstance(got, dict):
        wrong("choose must raise ValueError where no candidate fits; it returned a layout that cannot be run", points=2)
    if "12" not in re.findall(r"\d+", got["refused"]):
        wrong(f"the error must name the fewest bytes that are needed, 12; it says {got['refused']!r:.80}", points=3)


def best_of(stages: int, batch: int, work: float, speed: float, overhead: float, how: str = "") -> tuple[int, float]:
    found = []
    for m in (m for m in range(1, batch + 1) if batch % m == 0):
        products, starts = batch * work / (stages * speed), m * overhead
        ratio, share = (stages - 1) / m, (stages - 1) / (m + stages - 1)
        total = {
            "": (products + starts) * (1 + ratio), "share": (products + starts) * (1 + share),
            "none": products + starts, "work only": products * (1 + ratio) + starts,
        }  # fmt: skip
        found.append((total[how], m))
    took, m = min(found)
    return m, took


HUNT = {
    "share": "the bubble, (p - 1) / (m + p - 1), is the idle share of the *whole* time. The useful time is the rest, so"
    " whole = useful / (1 - bubble); run m = 1 by hand on 4 stages",
    "none": "without a bubble a pipeline of p stages is always p times as fast; on the virtual clock it is not",
    "work only": "while the pipeline fills and drains, stages also wait for each microbatch's overhead",
}


@lesson.check("the bug hunt: a bubble is a share of what?", points=4)
def check_hunt(run: Run) -> None:
    cases = [(4, 1, 8.0, 2.0, 0.0), (4, 16, 8.0, 2.0, 0.5), (8, 24, 3.0, 1.0, 0.125), (1, 12, 5.0, 4.0, 0.25),
             (3, 12, 6.0, 1.0, 0.0)]  # fmt: skip
    for case in cases:
        got, (m, took) = run(call, "microbatches_for", *case), best_of(*case)
        where = f"microbatches_for{case}"
        if not isinstance(got, list | tuple) or len(got) != 2 or got[0] is None:
            wrong(f"{where} must return (microbatches, seconds); it returned {got!r:.60}")
        if int(got[0]) == m and close(float(got[1]), took):
            continue
        for how, message in HUNT.items():
            if close([int(got[0]), float(got[1])], list(best_of(*case, how))):
                wrong(f"{where} = ({got[0]}, {float(got[1]):g}): {message}")
        wrong(f"{where} = ({got[0]}, {float(got[1]):g}), expected ({m}, {took:g}): m + p - 1 turns of a microbatch", 1)
