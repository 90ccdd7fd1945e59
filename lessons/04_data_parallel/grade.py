"""Grader of lesson 4: gradients, weights and traffic of data parallelism, against the serial model."""

from itertools import pairwise

import numpy as np

import minipar
from minipar import Tensor, optim
from minipar.errors import HangError, MismatchError
from minipar.grading import Lesson, Run, close, wrong
from minipar.models import MLP, MLPConfig

lesson = Lesson(4)
FEATURES, CLASSES, IGNORED = 6, 3, -100


def build(seed=0, dtype="float64"):
    return MLP(MLPConfig(inputs=FEATURES, classes=CLASSES, width=5, layers=2)).materialize(seed, dtype)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def weights(model):
    return {name: p.data.copy() for name, p in model.named_parameters()}


# In the submission's process ---------------------------------------------------------------------------


class Counting(MLP):
    """The same model, which notes how many samples pass through it."""

    samples = 0

    def forward(self, x):
        self.samples += len(x.data)
        return super().forward(x)


def on_ranks(ranks, program):
    """Run `program(comm)` on threads; per rank: what it returned, and calls and elements by operation."""

    def one_rank():
        comm = minipar.world()
        found = program(comm)
        rows = comm.ledger.as_dict()
        return {**found, "traffic": {operation: row[:2] for (operation, _), row in rows.items()}}

    try:
        return minipar.launch(one_rank, ranks)
    except (HangError, MismatchError) as error:
        return {type(error).__name__: str(error)}


@lesson.probe
def shards(submission, samples, ranks):
    cuts = [submission.shard(samples, rank, ranks) for rank in range(ranks)]
    return [[cut.start, cut.stop] if isinstance(cut, slice) else repr(cut) for cut in cuts]


@lesson.probe
def summed(submission, ranks, x, y, stale):
    def program(comm):
        config = MLPConfig(inputs=FEATURES, classes=CLASSES, width=5, layers=2)
        model = Counting(config).materialize(0, "float64")
        if stale:
            for p in model.parameters():
                p.grad = np.ones(p.shape)
        mine = x.copy()
        loss = submission.sum_gradients(comm, model, mine, y.copy())
        return {
            "loss": loss, "gradients": gradients(model), "samples": model.samples, "weights": weights(model),
            "changed": not np.array_equal(mine, x),
        }  # fmt: skip

    return on_ranks(ranks, program)


@lesson.probe
def master_steps(submission, parts, master):
    def program(comm):
        model = build()
        update = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in parts:
            for p, part in zip(model.parameters(), step[comm.rank]):
                p.grad = None if part is None else part.copy()
            submission.step_at_master(comm, model, update, master)
        left = sum(p.grad is not None for p in model.parameters())
        return {
            "weights": weights(model),
            "left": left,
            "stepped": any(update.state[i] for i in update.state),
        }

    return on_ranks(len(parts[0]), program)


@lesson.probe
def averaged(submission, seen, dtype):
    def program(comm):
        model = build(seed=comm.rank, dtype=dtype)
        submission.average_parameters(comm, model, seen[comm.rank])
        return {"weights": weights(model)}

    return on_ranks(len(seen), program)


@lesson.probe
def accumulated(submission, pieces, count):
    def program(comm):
        model = build()
        for p in model.parameters():
            p.grad = np.ones(p.shape)
        submission.accumulate_gradients(comm, model, pieces[comm.rank], count)
        return {"gradients": gradients(model)}

    return on_ranks(len(pieces), program)


# In the grader's ---------------------------------------------------------------------------------------


def share(samples, rank, ranks):
    size, extra = divmod(samples, ranks)
    start = rank * size + min(rank, extra)
    return slice(start, start + size + (rank < extra))


def serial(x, y, divisor):
    """Return loss and gradients of a serial model; zeros of no samples."""
    model = build()
    if not len(x):
        return 0.0, {name: np.zeros(p.shape) for name, p in model.named_parameters()}
    loss = model.loss(model(Tensor(x)), y) / divisor
    loss.backward()
    return loss.item(), gradients(model)


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays.values()])


def factors(value, parts):
    """Return by how much each part is in `value`, if it is a weighted sum of them; else None."""
    used = [i for i, part in enumerate(parts) if np.any(part)]
    found, *_ = np.linalg.lstsq(np.stack([parts[i] for i in used], axis=1), value, rcond=None)
    if not close(sum(f * parts[i] for f, i in zip(found, used)), value, 1e-7):
        return None
    return {i: float(f) for f, i in zip(found, used)}


def say_factors(found):
    """Name the weights of the ranks' parts; equal ones together."""
    groups = {}
    for rank, factor in found.items():
        groups.setdefault(f"{factor:.3g}", []).append(str(rank))
    return ", ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {' and '.join(ranks)} times {factor}"
        for factor, ranks in groups.items()
    )


def ended_well(found, where):
    """Return what the ranks found; a hang or a mismatch ends the check."""
    if isinstance(found, dict):
        if "HangError" in found:
            wrong(
                f"{where} it hangs: {found['HangError']}. Every rank must call every collective, also one that has"
                " nothing to add"
            )
        wrong(
            f"{where} the ranks call different collectives: {found['MismatchError']}. All must call the same ones in"
            " the same order, also a rank that has nothing to add"
        )
    return found


def data(samples, seed, ignored=()):
    rng = np.random.default_rng([4, seed])
    x, y = rng.normal(size=(samples, FEATURES)), rng.integers(0, CLASSES, samples)
    y[list(ignored)] = IGNORED
    return x, y


def judge_gradients(found, parts, where):
    """End the check if any rank's gradients are not the sum of `parts`, with what they are instead."""
    right = np.sum(parts, axis=0)
    for rank, facts in enumerate(found):
        missing = [name for name, g in facts["gradients"].items() if g is None]
        if missing:
            wrong(f"{where} {missing[0]}.grad is None on rank {rank}: every rank gets the sum")
    names = list(found[0]["gradients"])
    model = build()
    for facts in found:
        for name, p in model.named_parameters():
            if np.shape(facts["gradients"][name]) != p.shape:
                wrong(
                    f"{where} {name}.grad has shape {np.shape(facts['gradients'][name])}, the parameter {p.shape}"
                )
    got = [flat({name: facts["gradients"][name] for name in names}) for facts in found]
    if all(close(value, right) for value in got):
        return None
    ranks = len(found)
    if not all(np.all(np.isfinite(value)) for value in got):
        wrong(
            f"{where} the gradient has NaNs: a rank without a valid target divides by its own count, which is 0. Divide"
            " by the count of the whole batch, which every rank knows"
        )
    if all(close(value, right + 1) or close(value, right + ranks) for value in got):
        wrong(f"{where} the gradient of the step before is still in it: call model.zero_grad() first")
    if ranks > 1 and all(close(value, part) for value, part in zip(got, parts)):
        wrong(
            f"{where} every rank has the gradient of its own share only: sum over the ranks, assign it to p.grad"
        )
    rank = next(r for r in range(ranks) if not close(got[r], right))
    times = factors(got[rank], parts)
    if times is None:
        wrong(
            f"{where} the gradient on rank {rank} is no sum of the ranks' gradients, however weighted: does each"
            " rank take its own shard, the same rows of x and y, and does backward run once on each?"
        )
    return times, rank


# Checks ------------------------------------------------------------------------------------------------


@lesson.check("shards cover the batch, in order, sizes differing by one at most", points=2)
def check_shards(run: Run):
    for samples, ranks in ((10, 4), (7, 3), (12, 4), (3, 5), (0, 2), (5, 1), (8, 3)):
        got = run(shards, samples, ranks)
        right = [[share(samples, r, ranks).start, share(samples, r, ranks).stop] for r in range(ranks)]
        if got == right:
            continue
        where = f"{samples} samples on {ranks} ranks:"
        if not all(isinstance(cut, list) for cut in got):
            wrong(f"{where} a slice was expected, this came: {got[0]}")
        if any(None in cut for cut in got):
            wrong(f"{where} give the slice a start and a stop, both numbers")
        covered = [i for start, stop in got for i in range(start, min(stop, samples))]
        lost = sorted(set(range(samples)) - set(covered))
        if lost:
            wrong(
                f"{where} nobody works on sample {', '.join(map(str, lost))}: the remainder of {samples} / {ranks}"
                " belongs to someone, too"
            )
        if len(covered) > len(set(covered)):
            wrong(f"{where} some samples belong to two ranks: each start is the stop of the rank before")
        sizes = [stop - start for start, stop in got]
        if max(sizes) - min(sizes) > 1:
            wrong(
                f"{where} the shares have sizes {sizes}. The slowest rank decides how long a step takes: give one"
                " sample more to each of the first ranks, instead of all the rest to one",
                points=1,
            )
        wrong(f"{where} {got} instead of {right}: contiguous, the first {samples % ranks} ranks one more")


@lesson.check("every rank has the full batch's gradient and loss", points=5)
def check_sum_gradients(run: Run):
    cases = (
        (1, data(5, 1), False, "on one rank"),
        (4, data(8, 2), False, "on 4 ranks with equal shares"),
        (3, data(7, 3), False, "on 3 ranks with shares of 3, 2 and 2 samples"),
        (2, data(6, 4), True, "on 2 ranks, with gradients left from the step before,"),
        (3, data(6, 5, ignored=(0, 1, 4)), False, "on 3 ranks with 0, 2 and 1 valid targets"),
        (4, data(3, 6), False, "on 4 ranks with 3 samples"),
    )
    runs = [ended_well(run(summed, ranks, x, y, stale), where) for ranks, (x, y), stale, where in cases]
    for (ranks, (x, y), _, where), found in zip(cases, runs):
        count = np.count_nonzero(y != IGNORED)
        cuts = [share(len(x), rank, ranks) for rank in range(ranks)]
        parts = [flat(serial(x[cut], y[cut], count)[1]) for cut in cuts]
        judged = judge_gradients(found, parts, where)
        if judged is not None:
            times, rank = judged
            valid = [np.count_nonzero(y[cut] != IGNORED) for cut in cuts]
            factor = next(iter(times.values()))
            same = all(abs(f - factor) < 1e-6 for f in times.values())
            means = all(abs(f - count / valid[r] / ranks) < 1e-6 for r, f in times.items())
            if same and abs(factor - ranks) < 1e-6 and ranks > 1:
                wrong(
                    f"{where} the gradient is {ranks} times too large: was each rank's loss divided by its own count"
                    " and the results summed? Divide by the count of the whole batch"
                )
            if same and abs(factor - 1 / ranks) < 1e-6 and ranks > 1:
                wrong(
                    f"{where} the gradient is {ranks} times too small: the losses are divided by the global count"
                    " already, so gradients are summed over ranks, not averaged"
                )
            if means:
                wrong(
                    f"{where} the gradient is the mean of the ranks' means (parts weighted {say_factors(times)}):"
                    " samples on a smaller share count more. Divide each rank's sum by the count of the whole batch",
                    points=1,
                )
            if all(abs(f - count / valid[r]) < 1e-6 for r, f in times.items()):
                wrong(
                    f"{where} each rank's loss was divided by its own count, and then summed: divide by the count of"
                    " valid targets in the whole batch",
                )
            if same and abs(factor - count / len(x)) < 1e-6:
                wrong(
                    f"{where} the loss was divided by {len(x)} samples, but only {count} targets are valid: count"
                    " those that are not IGNORED, in the whole batch",
                    points=2,
                )
            if same:
                wrong(
                    f"{where} the gradient is {factor:.4g} times what it should be: look at what the loss is divided by"
                )
            wrong(
                f"{where} rank {rank} has the sum of the ranks' parts with weights, {say_factors(times)}; all should"
                " be 1: each rank's sum of losses divided by the global count, then a plain sum over the ranks"
            )
    for (ranks, (x, y), _, where), found in zip(cases, runs):
        loss = serial(x, y, np.count_nonzero(y != IGNORED))[0]
        if any(facts["changed"] for facts in found):
            wrong(f"{where} x was changed: the caller still needs it")
        if not close([facts["weights"] for facts in found], [weights(build())] * ranks):
            wrong(
                f"{where} the model's values were changed: this function computes gradients, the step comes later"
            )
        for rank, facts in enumerate(found):
            if (
                not isinstance(facts["loss"], int | float | np.ndarray | np.generic)
                or np.size(facts["loss"]) != 1
            ):
                wrong(
                    f"{where} rank {rank} returned {facts['loss']!r:.60} as the loss; a float was expected",
                    points=4,
                )
            if not close(float(np.reshape(facts["loss"], ())), loss):
                wrong(
                    f"{where} the gradients are right, but rank {rank} returned a loss of {float(facts['loss']):.4f}"
                    f" instead of {loss:.4f}: the loss is summed over the ranks like the gradients",
                    points=4,
                )


@lesson.check("each rank computes its own share only", points=1)
def check_share_only(run: Run):
    x, y = data(7, 7)
    found = ended_well(run(summed, 3, x, y, False), "on 3 ranks")
    for rank, facts in enumerate(found):
        cut = share(7, rank, 3)
        if facts["samples"] > cut.stop - cut.start:
            wrong(
                f"rank {rank} of 3 put {facts['samples']} samples through the model, its share of 7 is"
                f" {cut.stop - cut.start}: then more ranks make nothing faster. Cut x and y first"
            )
        if facts["samples"] < cut.stop - cut.start:
            wrong(f"rank {rank} of 3 put {facts['samples']} samples through the model, its share has more")


def master_parts(ranks, steps, seed, none_on=()):
    rng = np.random.default_rng([4, seed])
    shapes = [p.shape for p in build().parameters()]
    return [
        [[None if rank in none_on else rng.normal(size=s) for s in shapes] for rank in range(ranks)]
        for _ in range(steps)
    ]


def master_reference(parts, scale=1.0):
    model = build()
    update = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in parts:
        for i, p in enumerate(model.parameters()):
            p.grad = scale * np.sum([part[i] for part in step if part[i] is not None], axis=0)
        update.step()
    return weights(model)


@lesson.check("a master's step: all ranks get the serial step's parameters", points=4)
def check_master(run: Run):
    for ranks, master, none_on in ((1, 0, ()), (3, 0, ()), (4, 2, ()), (3, 1, (0, 2))):
        parts = master_parts(ranks, 2, 20 + ranks + master, none_on)
        where = f"on {ranks} ranks with master {master}"
        found = ended_well(run(master_steps, parts, master), where)
        right = master_reference(parts)
        got = [facts["weights"] for facts in found]
        if close(got, [right] * ranks):
            if len({flat(w).tobytes() for w in got}) > 1:
                wrong(
                    f"{where} the ranks' parameters differ in their last bits: send the master's to everyone"
                )
            continue
        if close(got, [weights(build())] * ranks):
            wrong(
                f"{where} nothing changed: the master's optimizer must step, and its parameters go to everyone"
            )
        if close(got[master], right):
            others = [r for r in range(ranks) if not close(got[r], right)]
            if all(close(got[r], weights(build())) for r in others):
                wrong(
                    f"{where} rank {others[0]} still has its old parameters: broadcast the new ones from the master and"
                    " write what comes into the model with p.assign_",
                    points=2,
                )
            wrong(
                f"{where} the master is right, and rank {others[0]} has other parameters: who stepped there?",
                points=2,
            )
        if ranks > 1 and close(got, [master_reference(parts, 1 / ranks)] * ranks):
            wrong(
                f"{where} the step was taken with the mean of the parts: they are divided by the global count already,"
                " so their sum is the gradient",
            )
        own = [[part[master] if part[master][0] is not None else step_zero(part)] for part in parts]
        if close(got[master], master_reference(own)):
            wrong(
                f"{where} the master stepped with its own gradient: assign the result of reduce to p.grad before"
            )
        if master != 0 and close(got[0], right):
            wrong(f"{where} rank 0 has the result: the master is rank {master}, pass root=master")
        wrong(
            f"{where} the parameters are not those of a step with the sum of all parts: reduce every p.grad to the"
            " master (zeros where it is None), step there once, then broadcast"
        )


def step_zero(parts):
    shapes = [p.shape for p in build().parameters()]
    return [np.zeros(s) for s in shapes]


@lesson.check("a master's step: one reduce and one broadcast a parameter, state at the master only", points=1)
def check_master_traffic(run: Run):
    found = ended_well(run(master_steps, master_parts(3, 1, 30), 1), "on 3 ranks with master 1")
    n = len(list(build().parameters()))
    for rank, facts in enumerate(found):
        calls = {operation: row[0] for operation, row in facts["traffic"].items()}
        if calls != {"reduce": n, "broadcast": n}:
            said = ", ".join(f"{count} {operation}" for operation, count in sorted(calls.items())) or "no"
            wrong(
                f"rank {rank} made {said} calls for {n} parameters; {n} reduce and {n} broadcast are enough. An"
                " all_reduce gives every rank a sum that only the master needs"
            )
        if rank != 1 and facts["stepped"]:
            wrong(
                f"with master 1, rank {rank}'s optimizer was stepped and has state now: the master alone steps, that is"
                " what saves the memory"
            )
        if facts["left"]:
            wrong(
                f"{facts['left']} parameters still have a gradient on rank {rank}: set p.grad = None at the end"
            )


@lesson.check("parameters are averaged by what each rank has seen", points=3)
def check_average(run: Run):
    for seen, dtype in (([4, 4], "float64"), ([3, 1, 2], "float64"), ([5, 0], "float64"), ([0, 0, 0], "float64"),
                        ([1, 2], "float32")):  # fmt: skip
        ranks = len(seen)
        found = ended_well(run(averaged, seen, dtype), f"on {ranks} ranks that have seen {seen} targets")
        got = [facts["weights"] for facts in found]
        where = f"on {ranks} ranks that have seen {seen} targets"
        total = sum(seen)
        shares = [n / total if total else 1 / ranks for n in seen]
        starts = [weights(build(rank, dtype)) for rank in range(ranks)]
        parts = [flat(start) for start in starts]
        right = sum(s * part for s, part in zip(shares, parts))
        kinds = {str(a.dtype) for w in got for a in w.values()}
        if kinds != {dtype}:
            wrong(
                f"{where} parameters of {dtype} became {', '.join(sorted(kinds))}: p.assign_ keeps their dtype",
                points=2,
            )
        values = [flat(w) for w in got]
        if all(close(v, right, 1e-6 if dtype == "float32" else 1e-8) for v in values):
            if len({v.tobytes() for v in values}) > 1:
                wrong(f"{where} the ranks' bits differ: take what all_reduce returns, the same on all ranks")
            continue
        if not all(np.all(np.isfinite(v)) for v in values):
            wrong(
                f"{where} there are NaNs: nobody has seen anything, so the total is 0; weigh all ranks the same then",
                2,
            )
        if all(close(v, part) for v, part in zip(values, parts)):
            wrong(
                f"{where} the parameters are those from before: write the average into the model with p.assign_"
            )
        times = factors(values[0], parts)
        if times is not None and all(abs(f - 1 / ranks) < 1e-6 for f in times.values()):
            wrong(f"{where} all ranks weigh the same: a rank that saw more targets must weigh more", points=1)
        if times is not None and all(abs(f - n) < 1e-6 for f, n in zip(times.values(), seen)):
            wrong(
                f"{where} the parameters are {total} times too large: divide by what all ranks together have seen"
            )
        if times is not None and all(abs(f - 1) < 1e-6 for f in times.values()):
            wrong(
                f"{where} the parameters are summed: weigh each rank by its share, so that the weights add up to 1"
            )
        if times is not None:
            wrong(
                f"{where} the weights are {say_factors(times)}; they should be seen / total: {np.round(shares, 3)}"
            )
        wrong(f"{where} rank 0's parameters are no weighted sum of the ranks'")


@lesson.check("bug hunt: microbatches add up to the full batch's gradient", points=4)
def check_accumulate(run: Run):
    n = len(list(build().parameters()))
    for sizes in (
        [[4], [3]],
        [[2, 2], [2, 1]],
        [[1, 1, 1, 1], [2, 1, 1, 1]],
        [[2, 1]] * 4,
        [[2, 1, 1], [3], []],
    ):
        ranks = len(sizes)
        where = f"on {ranks} ranks with {' and '.join(str(len(s)) for s in sizes)} microbatches"
        flattened = [size for of_rank in sizes for size in of_rank]
        x, y = data(sum(flattened), 40 + sum(flattened) + ranks, ignored=(0,))
        count = np.count_nonzero(y != IGNORED)
        ends = np.cumsum([0, *flattened])
        cuts = iter([slice(a, b) for a, b in pairwise(ends)])
        pieces = [[(x[cut], y[cut]) for _, cut in zip(of_rank, cuts)] for of_rank in sizes]
        found = ended_well(run(accumulated, pieces, count), where)
        by_piece = [[flat(serial(px, py, count)[1]) for px, py in of_rank] for of_rank in pieces]
        zeros = np.zeros(sum(p.size for p in build().parameters()))
        judged = judge_microbatches(found, by_piece, zeros, where)
        if judged:
            wrong(judged)
        calls = {operation: row[0] for operation, row in found[0]["traffic"].items()}
        if set(calls) != {"all_reduce"} or calls["all_reduce"] != n:
            said = ", ".join(f"{c} {operation}" for operation, c in sorted(calls.items()))
            wrong(
                f"{where} the gradient is right, with {said} calls for {n} parameters: one all_reduce a parameter is"
                " enough, after the last microbatch",
                points=2,
            )


def judge_microbatches(found, by_piece, zeros, where):
    """Return what is wrong with gradients summed from microbatches, or nothing."""
    parts = [sum(of_rank, zeros) for of_rank in by_piece]
    ranks, most = len(parts), max(map(len, by_piece))
    right = sum(parts)
    for rank, facts in enumerate(found):
        if any(g is None for g in facts["gradients"].values()):
            return f"{where} rank {rank} has parameters without a gradient: every rank gets the sum"
    got = [flat(facts["gradients"]) for facts in found]
    if all(close(value, right) for value in got):
        return None
    last = sum((of_rank[-1] for of_rank in by_piece if of_rank), zeros)
    if all(close(value, last) for value in got):
        return (
            f"{where} only the last microbatch is in the gradient: zero_grad belongs before the first one, since"
            " backward adds to what is there"
        )
    if all(close(value, right / most) for value in got) and most > 1:
        return f"{where} the gradient is {most} times too small: `count` is that of the whole batch already"
    if all(close(value, right / ranks) for value in got):
        return (
            f"{where} the gradient is {ranks} times too small: gradients are summed over ranks, not averaged"
        )
    if all(close(value, right + 1) or close(value, right + ranks) for value in got):
        return f"{where} the gradient of the step before is still in it: call zero_grad before the first microbatch"
    if all(close(value, part) for value, part in zip(got, parts)):
        return f"{where} every rank has its own gradient only: sum over the ranks, once, at the end"
    repeated = zeros
    for i in range(most):
        earlier = repeated * ranks if i else zeros
        repeated = earlier + sum((of_rank[i] for of_rank in by_piece if len(of_rank) > i), zeros)
    if all(close(value, repeated) for value in got):
        return (
            f"{where} the first microbatch counts {ranks ** (most - 1)} times: after its all_reduce every rank holds"
            " the sum, adds its next microbatch to that, and sums it all again. When is each rank's own gradient"
            " complete?"
        )
    return f"{where} the gradients are not the full batch's; on rank 0 they are {np.abs(got[0] - right).max():.2g} off"
