"""Grader of lesson 4: gradients, weights and traffic of data parallelism, against the serial model."""

from itertools import pairwise

import numpy as np

import minipar
from minipar import Tensor, optim
from minipar.errors import HangError, MismatchError
from minipar.grading import Lesson, Run, close, wrong
from minipar.models import MLP, MLPConfig

lesson = Lesson(4, forbidden=("minipar.parallel", "minipar.distribute"))
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
    """Run `program(comm)` on threads; per rank: what it returned, and its calls by operation."""

    def one_rank():
        comm = minipar.world()
        found = program(comm)
        return {
            **found,
            "traffic": {operation: row[0] for (operation, _), row in comm.ledger.as_dict().items()},
        }

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


def data(samples, seed, ignored=()):
    rng = np.random.default_rng([4, seed])
    x, y = rng.normal(size=(samples, FEATURES)), rng.integers(0, CLASSES, samples)
    y[list(ignored)] = IGNORED
    return x, y


def serial(x, y, divisor):
    """Return loss and flat gradient of a serial model; zeros of no samples."""
    model = build()
    if not len(x):
        return 0.0, np.zeros(sum(p.size for p in model.parameters()))
    loss = model.loss(model(Tensor(x)), y) / divisor
    loss.backward()
    return loss.item(), flat(gradients(model))


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays.values()])


def flat_of_ranks(found, what, where):
    """Return each rank's gradients or weights as one array; None or another shape ends the check."""
    shapes = {name: p.shape for name, p in build().named_parameters()}
    for rank, facts in enumerate(found):
        for name, array in facts[what].items():
            if array is None:
                wrong(f"{where} {name}.grad is None on rank {rank}: every rank gets the sum")
            if np.shape(array) != shapes[name]:
                wrong(f"{where} {name} has {what} of shape {np.shape(array)}, its values are {shapes[name]}")
    return [flat(facts[what]) for facts in found]


def name_mistake(where, got, mistakes):
    """End the check with the first of the (values of all ranks, message, points) that the ranks have."""
    for values, message, *points in mistakes:
        if close(got, list(values)):
            wrong(f"{where} {message}", *points)


def contents(value, parts):
    """Say by how much each rank's part is in `value`; None if it is no weighted sum of them."""
    used = [i for i, part in enumerate(parts) if np.any(part)]
    found, *_ = np.linalg.lstsq(np.stack([parts[i] for i in used], axis=1), value, rcond=None)
    if not close(sum(f * parts[i] for f, i in zip(found, used)), value, 1e-7):
        return None
    return ", ".join(f"that of rank {i} times {factor:.3g}" for i, factor in zip(used, found))


def ended_well(found, where):
    """Return what the ranks found; a hang or a mismatch ends the check."""
    if isinstance(found, dict):
        what = "it hangs" if "HangError" in found else "the ranks call different collectives"
        wrong(
            f"{where} {what}: {next(iter(found.values()))}. Every rank must call every collective, in the same order,"
            " also a rank that has nothing to add"
        )
    return found


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
                f"{where} nobody works on sample {', '.join(map(str, lost))}: the remainder belongs to someone, too"
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
        judge_gradients(found, ranks, x, y, where)
    for (ranks, (x, y), _, where), found in zip(cases, runs):
        if any(facts["changed"] for facts in found):
            wrong(f"{where} x was changed: the caller still needs it")
        if not close([facts["weights"] for facts in found], [weights(build())] * ranks):
            wrong(
                f"{where} the model's values were changed: this function computes gradients, the step is later"
            )
        judge_losses(found, serial(x, y, np.count_nonzero(y != IGNORED))[0], where)


def judge_gradients(found, ranks, x, y, where):
    """End the check if a rank's gradients are not the full batch's, with what they are instead."""
    count = np.count_nonzero(y != IGNORED)
    cuts = [share(len(x), rank, ranks) for rank in range(ranks)]
    valid = [np.count_nonzero(y[cut] != IGNORED) for cut in cuts]
    parts = [serial(x[cut], y[cut], count)[1] for cut in cuts]
    right, got = sum(parts), flat_of_ranks(found, "gradients", where)
    if close(got, [right] * ranks):
        return
    if not np.all(np.isfinite(got)):
        wrong(
            f"{where} the gradient has NaNs: a rank without a valid target divides by its own count, which is 0. Divide"
            " by the count of the whole batch, which every rank knows"
        )
    means = sum(count / n * part for n, part in zip(valid, parts) if n)
    name_mistake(where, got, (
        ([right + ranks] * ranks, "the gradient of the step before is still in it: call model.zero_grad() first"),
        (parts, "every rank has the gradient of its own share only: sum over the ranks, assign it to p.grad"),
        ([ranks * right] * ranks,
         f"the gradient is {ranks} times too large: was each rank's loss divided by its own count and the results"
         " summed? Divide by the count of the whole batch"),
        ([right / ranks] * ranks,
         f"the gradient is {ranks} times too small: the losses are divided by the global count already, so gradients"
         " are summed over ranks, not averaged"),
        ([means / ranks] * ranks,
         "the gradient is the mean of the ranks' means: samples on a smaller share count more. Divide each rank's sum"
         " by the count of the whole batch", 1),
        ([means] * ranks,
         "each rank's loss was divided by its own count, and then summed: divide by the count of the whole batch"),
        ([right * count / len(x)] * ranks,
         f"the loss was divided by {len(x)} samples, but only {count} targets are valid: count those that are not"
         " IGNORED, in the whole batch", 2),
    ))  # fmt: skip
    rank = next(r for r in range(ranks) if not close(got[r], right))
    inside = contents(got[rank], parts)
    if inside is None:
        wrong(
            f"{where} the gradient on rank {rank} is no sum of the ranks' gradients, however weighted: does each"
            " rank take its own shard, the same rows of x and y, and does backward run once on each?"
        )
    wrong(
        f"{where} rank {rank} has the sum of the ranks' gradients with other weights, {inside}. All should be 1: each"
        " rank's sum of losses divided by the global count, then a plain sum over the ranks"
    )


def judge_losses(found, right, where):
    """End the check if a rank returned another loss."""
    for rank, facts in enumerate(found):
        if (
            not isinstance(facts["loss"], int | float | np.ndarray | np.generic)
            or np.size(facts["loss"]) != 1
        ):
            wrong(f"{where} rank {rank} returned {facts['loss']!r:.60} as the loss; a float was expected", 4)
        loss = np.ravel(facts["loss"])[0]
        if not np.isfinite(loss):
            wrong(
                f"{where} the loss is {loss}: a rank without a valid target divides 0 by 0. Divide by the count of the"
                " whole batch",
                points=3,
            )
        if not close(float(loss), right):
            wrong(
                f"{where} the gradients are right, but rank {rank} returned a loss of {loss:.4f} instead of"
                f" {right:.4f}: the loss is summed over the ranks like the gradients",
                points=4,
            )


@lesson.check("each rank computes its own share only", points=1)
def check_share_only(run: Run):
    x, y = data(7, 7)
    found = ended_well(run(summed, 3, x, y, False), "on 3 ranks")
    for rank, facts in enumerate(found):
        size = share(7, rank, 3).stop - share(7, rank, 3).start
        if facts["samples"] != size:
            wrong(
                f"rank {rank} of 3 put {facts['samples']} samples through the model, its share of 7 is {size}. If all"
                " compute everything, more ranks make nothing faster: cut x and y first"
            )


def master_parts(ranks, seed, none_on=()):
    """Return gradients of two steps, by step, rank and parameter."""
    rng = np.random.default_rng([4, seed])
    shapes = [p.shape for p in build().parameters()]
    return [
        [[None if rank in none_on else rng.normal(size=s) for s in shapes] for rank in range(ranks)]
        for _ in range(2)
    ]


def stepped_with(parts, use):
    """Return the flat weights after serial steps with the gradient that `use(parts of all ranks)` gives."""
    model = build()
    update = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in parts:
        for i, p in enumerate(model.parameters()):
            p.grad = use([np.zeros(p.shape) if part[i] is None else part[i] for part in step])
        update.step()
    return flat(weights(model))


@lesson.check("a master's step: all ranks get the serial step's parameters", points=4)
def check_master(run: Run):
    for ranks, master, none_on in ((1, 0, ()), (3, 0, ()), (4, 2, ()), (3, 1, (0, 2))):
        parts = master_parts(ranks, 20 + ranks + master, none_on)
        where = f"on {ranks} ranks with master {master}"
        got = flat_of_ranks(ended_well(run(master_steps, parts, master), where), "weights", where)
        right, old = stepped_with(parts, sum), flat(weights(build()))
        if close(got, [right] * ranks):
            if len({value.tobytes() for value in got}) > 1:
                wrong(
                    f"{where} the ranks' parameters differ in their last bits: send the master's to everyone"
                )
            continue
        if close(got[master], right):
            other = next(r for r in range(ranks) if not close(got[r], right))
            if not close(got[other], old):
                wrong(
                    f"{where} the master is right, and rank {other} has other parameters: who stepped there?",
                    2,
                )
            wrong(
                f"{where} rank {other} still has its old parameters: broadcast the new ones from the master and write"
                " what comes into the model with p.assign_",
                points=2,
            )
        own = stepped_with(parts, lambda of_ranks, m=master: of_ranks[m])
        mean = stepped_with(parts, lambda of_ranks: sum(of_ranks) / len(of_ranks))
        name_mistake(where, got, (
            ([old] * ranks,
             "nothing changed: the sum must arrive at the master (root=master), its optimizer must step there, and its"
             " parameters go to everyone"),
            ([mean] * ranks,
             "the step was taken with the mean of the parts: they are divided by the global count already, so their"
             " sum is the gradient"),
            ([own] * ranks, "the master stepped with its own gradient: put the result of reduce into p.grad before"),
        ))  # fmt: skip
        wrong(
            f"{where} the parameters are not those of a step with the sum of all parts: reduce every p.grad to the"
            " master (zeros where it is None), step there once, then broadcast, with root=master in both"
        )


@lesson.check("a master's step: one reduce and one broadcast a parameter, state at the master only", points=1)
def check_master_traffic(run: Run):
    found = ended_well(run(master_steps, master_parts(3, 30)[:1], 1), "on 3 ranks with master 1")
    n = len(list(build().parameters()))
    for rank, facts in enumerate(found):
        if facts["traffic"] != {"reduce": n, "broadcast": n}:
            wrong(
                f"rank {rank} called {facts['traffic']} for {n} parameters; {n} reduce and {n} broadcast are enough."
                " An all_reduce gives every rank a sum that only the master needs"
            )
        if rank != 1 and facts["stepped"]:
            wrong(
                f"with master 1, rank {rank}'s optimizer was stepped and has state now: the master alone steps, that"
                " is what saves the memory"
            )
        if facts["left"]:
            wrong(
                f"{facts['left']} parameters still have a gradient on rank {rank}: set p.grad = None at the end"
            )


@lesson.check("parameters are averaged by what each rank has seen", points=3)
def check_average(run: Run):
    cases = (([4, 4], "float64"), ([3, 1, 2], "float64"), ([5, 0], "float64"), ([0, 0, 0], "float64"),
             ([1, 2], "float32"))  # fmt: skip
    told = []  # the calls of each case
    for seen, dtype in cases:
        ranks, total = len(seen), sum(seen)
        where = f"on {ranks} ranks that have seen {seen} targets"
        found = ended_well(run(averaged, seen, dtype), where)
        told.append((where, found[0]["traffic"]))
        got = flat_of_ranks(found, "weights", where)
        parts = [flat(weights(build(rank, dtype))) for rank in range(ranks)]
        right = sum((n / total if total else 1 / ranks) * part for n, part in zip(seen, parts))
        kinds = {str(array.dtype) for facts in found for array in facts["weights"].values()}
        if kinds != {dtype}:
            wrong(f"{where} parameters of {dtype} became {', '.join(kinds)}: p.assign_ keeps their dtype", 2)
        if close(got, [right] * ranks, 1e-6 if dtype == "float32" else 1e-8):
            if len({value.tobytes() for value in got}) > 1:
                wrong(f"{where} the ranks' bits differ: take what all_reduce returns, the same on all ranks")
            continue
        if not np.all(np.isfinite(got)):
            wrong(
                f"{where} there are NaNs: nobody has seen anything, so the total is 0; weigh all ranks the same then",
                2,
            )
        name_mistake(where, got, (
            (parts, "the parameters are those from before: write the average into the model with p.assign_"),
            ([sum(parts) / ranks] * ranks, "all ranks weigh the same: a rank that saw more targets must weigh more", 1),
            ([sum(n * part for n, part in zip(seen, parts))] * ranks,
             f"the parameters are {total} times too large: divide by what all ranks together have seen"),
            ([sum(parts)] * ranks, "the parameters are summed: weigh each rank by its share of what was seen"),
        ))  # fmt: skip
        wrong(
            f"{where} rank 0 has another sum of the ranks' parameters ({contents(got[0], parts) or 'of none of them'});"
            " each rank's weight is seen / total"
        )
    n = len(list(build().parameters()))
    for where, traffic in told:
        if traffic != {"all_reduce": n + 1}:
            wrong(
                f"{where} the average is right, with calls of {traffic} for {n} parameters: one all_reduce a parameter"
                " and one for the counts are enough, and no other collective is needed",
                points=2,
            )


@lesson.check("bug hunt: microbatches add up to the full batch's gradient", points=4)
def check_accumulate(run: Run):
    n = len(list(build().parameters()))
    cases = ([[4], [3]], [[2, 2], [2, 1]], [[1, 1, 1, 1], [2, 1, 1, 1]], [[2, 1]] * 4, [[2, 1, 1], [3], []])
    for sizes in cases:
        where = f"on {len(sizes)} ranks with {' and '.join(str(len(s)) for s in sizes)} microbatches"
        flattened = [size for of_rank in sizes for size in of_rank]
        x, y = data(sum(flattened), 40 + sum(flattened) + len(sizes), ignored=(0,))
        count = np.count_nonzero(y != IGNORED)
        cuts = iter([slice(start, stop) for start, stop in pairwise(np.cumsum([0, *flattened]))])
        pieces = [[(x[cut], y[cut]) for _, cut in zip(of_rank, cuts)] for of_rank in sizes]
        found = ended_well(run(accumulated, pieces, count), where)
        judge_microbatches(found, pieces, count, where)
        traffic = found[0]["traffic"]
        if traffic != {"all_reduce": n}:
            wrong(
                f"{where} the gradient is right, with calls of {traffic} for {n} parameters: one all_reduce a parameter"
                " is enough, after the last microbatch",
                points=2,
            )


def judge_microbatches(found, pieces, count, where):
    """End the check if gradients summed from microbatches are not the full batch's."""
    by_piece = [[serial(x, y, count)[1] for x, y in of_rank] for of_rank in pieces]
    zeros, ranks, most = serial([], [], 1)[1], len(pieces), max(map(len, pieces))
    parts = [sum(of_rank, zeros) for of_rank in by_piece]
    right, got = sum(parts), flat_of_ranks(found, "gradients", where)
    if close(got, [right] * ranks):
        return
    last = sum((of_rank[-1] for of_rank in by_piece if of_rank), zeros)
    again = zeros  # what comes of an all-reduce after each microbatch
    for i in range(most):
        again = ranks * again + sum((of_rank[i] for of_rank in by_piece if len(of_rank) > i), zeros)
    name_mistake(where, got, (
        ([last] * ranks,
         "only the last microbatch is in the gradient: zero_grad belongs before the first one, since backward adds to"
         " what is there"),
        ([right / most] * ranks, f"the gradient is {most} times too small: `count` is that of the whole batch already"),
        ([right / ranks] * ranks,
         f"the gradient is {ranks} times too small: gradients are summed over ranks, not averaged"),
        ([right + ranks] * ranks, "the gradient of the step before is in it: zero_grad comes before all microbatches"),
        (parts, "every rank has its own gradient only: sum over the ranks, once, at the end"),
        ([again] * ranks,
         f"the first microbatch counts {ranks ** (most - 1)} times, the last one once. What is in p.grad when the"
         " backward of the second one adds to it, and what is summed over the ranks then?"),
    ))  # fmt: skip
    wrong(
        f"{where} the gradients are not the full batch's; on rank 0 they are {np.abs(got[0] - right).max():.2g} off"
    )
