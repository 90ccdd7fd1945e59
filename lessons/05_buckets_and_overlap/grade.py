"""Grader of lesson 5: memory of buckets, a timeline, and sums that overlap with backward in virtual time."""

import numpy as np

import minipar
from minipar import Tensor, nn
from minipar.comm import Clock
from minipar.errors import HangError, MismatchError
from minipar.grading import Lesson, Run, close, wrong
from minipar.models import MLP, MLPConfig

lesson = Lesson(5, forbidden=("minipar.parallel", "minipar.distribute"))
LAYERS, RANKS = 3, 3
COMPUTE, ALPHA = 1.0, 0.1  # seconds a layer of backward; seconds a message, and none a byte
FACTORS = (1.0, 10.0)  # of the inputs of two layers, to tell their gradients apart
EARLY = "every hook counts one gradient down, and a bucket goes when *all* of its gradients have arrived"
SUM = 2 * (RANKS - 1) * ALPHA  # an all-reduce, however long


# In the submission's process ---------------------------------------------------------------------------


class Watched:
    """A communicator that notes when each all-reduce is begun, in any of its forms."""

    def __init__(self, comm):
        self.comm, self.rank, self.size, self.begun = comm, comm.rank, comm.size, []

    def __getattr__(self, name):
        method = getattr(self.comm, name)
        if not name.startswith("all_reduce"):
            return method

        def noted(*args, **kwargs):
            self.begun.append(self.comm.now())
            return method(*args, **kwargs)

        return noted


def mlp():
    return MLP(MLPConfig(inputs=4, classes=3, width=4, layers=LAYERS)).materialize(0, "float64")


def layer_buckets(model):
    """One bucket a layer, the last layer first."""
    return [[layer.fc.bias, layer.fc.weight] for layer in reversed(list(model.layers))]


def part_of_loss(model, rank, step):
    rng = np.random.default_rng([5, rank, step])
    x, y = rng.normal(size=(2, 4)), rng.integers(0, 3, 2)
    return model.loss(model(Tensor(x)), y) / (2 * RANKS)


def declare_compute(model, comm):
    for layer in model.layers:
        layer.fc.bias.register_hook(lambda p: comm.compute(COMPUTE))


def copies(model):
    return {n: None if p.grad is None else np.array(p.grad) for n, p in model.named_parameters()}


def on_ranks(program):
    try:
        return minipar.launch(program, RANKS, clock=Clock(ALPHA, 0.0))
    except (HangError, MismatchError) as error:
        return f"{type(error).__name__}: {error}"
    except (AttributeError, TypeError) as error:
        if "NoneType" not in str(error):
            raise
        return f"{type(error).__name__}: {error}. A gradient is None where its bucket is filled: {EARLY}"


@lesson.probe
def bucket(submission, shapes, dtype):
    flat, views = submission.flat_bucket([tuple(shape) for shape in shapes], dtype)
    zeros = bool(np.all(np.asarray(flat) == 0))
    inside = [bool(v.size == 0 or np.shares_memory(v, flat)) for v in views]
    for i, view in enumerate(views):
        view[...] = i + 1
    return {"flat": flat, "views": [v.copy() for v in views], "inside": inside, "zeros": zeros}


@lesson.probe
def assigned(submission, sizes, limit):
    return submission.assign_buckets(list(sizes), limit)


@lesson.probe
def timeline(submission, ready, seconds, backward_seconds):
    return submission.step_seconds(list(ready), list(seconds), backward_seconds)


@lesson.probe
def overlapped(submission, steps):
    def program():
        comm, model = Watched(minipar.world()), mlp()
        declare_compute(model, comm.comm)
        before, found = [len(p.hooks) for p in model.parameters()], []
        for step in range(steps):
            model.zero_grad()
            begin, comm.begun = comm.comm.now(), []
            submission.backward_with_overlap(comm, part_of_loss(model, comm.rank, step), layer_buckets(model))
            times = [t - begin for t in comm.begun]
            left = sum(len(p.hooks) for p in model.parameters()) - sum(before)
            end = comm.comm.now() - begin
            found.append({"gradients": copies(model), "begun": times, "end": end, "hooks": left})
        return found

    return on_ranks(program)


@lesson.probe
def crossed(submission):
    """Two layers of one shape, whose gradients arrive in another order on rank 1."""

    def program():
        comm = minipar.world()
        layers = [nn.Linear(2, 2).materialize(seed, "float64") for seed in (0, 1)]
        x = [Tensor(np.full((1, 2), factor * (1.0 + comm.rank))) for factor in FACTORS]
        first, second = (1, 0) if comm.rank == 1 else (0, 1)
        loss = layers[first](x[first]).sum() + layers[second](x[second]).sum()
        submission.backward_with_overlap(comm, loss, [[layer.weight, layer.bias] for layer in layers])
        return [np.array(layer.weight.grad) for layer in layers]

    return on_ranks(program)


@lesson.probe
def object_steps(submission, steps):
    def program():
        comm, model, found = Watched(minipar.world()), mlp(), []
        declare_compute(model, comm.comm)
        sums = submission.OverlappedGradients(comm, layer_buckets(model))
        for step in range(steps):
            model.zero_grad()
            begin, comm.begun = comm.comm.now(), []
            part_of_loss(model, comm.rank, step).backward()
            sums.finish()
            times = [t - begin for t in comm.begun]
            found.append({"gradients": copies(model), "begun": times, "end": comm.comm.now() - begin})
        return found

    return on_ranks(program)


# In the grader's ---------------------------------------------------------------------------------------


def gradient_parts(step):
    """Return each rank's own gradients of a step."""
    parts = []
    for rank in range(RANKS):
        model = mlp()
        part_of_loss(model, rank, step).backward()
        parts.append(copies(model))
    return parts


def total(parts):
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def ended_well(found, where):
    """Return what the ranks found; a hang or a mismatch ends the check."""
    if isinstance(found, str) and EARLY in found:
        wrong(f"{where} raises {found}")
    if isinstance(found, str):
        wrong(
            f"{where} communication fails: {found}. Every rank must begin the same sums in the same order, and wait"
        )
    return found


def judge_steps(found, where):
    """End the check if a gradient of any step is not the sum of the ranks'."""
    for step in range(len(found[0])):
        parts = gradient_parts(step)
        right = total(parts)
        at = f"{where}, step {step + 1}:"
        got = [of_rank[step]["gradients"] for of_rank in found]
        if close(got, [right] * RANKS):
            continue
        name = next(n for n in right if not all(close(g[n], right[n]) for g in got))
        if any(g[name] is None for g in got):
            wrong(f"{at} {name}.grad is None afterwards; it should be the sum over the ranks")
        if any(np.shape(g[name]) != np.shape(right[name]) for g in got):
            wrong(
                f"{at} {name}.grad has shape {np.shape(got[0][name])}: give it back in the parameter's shape"
            )
        if close(got, parts):
            more = ", though the first step was right: what does the object remember from the step before?"
            if step == 0:
                more = (
                    ". Was a bucket ever counted down to zero? A lambda in a loop keeps the variable, not its value of"
                    " then: bind it with i=i"
                )
            wrong(f"{at} every rank has its own gradient still, nothing was summed{more}")
        if step and all(close(g[name], total(gradient_parts(step - 1))[name]) for g in got):
            wrong(
                f"{at} the gradients are those of the step before: the bucket was not filled anew, or sent too early"
            )
        if close(got, [{n: g / RANKS for n, g in right.items()}] * RANKS):
            wrong(
                f"{at} gradients are averaged; the loss is divided by the global count already, so sum them"
            )
        if all(close(g[name], part[name]) for g, part in zip(got, parts)):
            wrong(
                f"{at} {name}.grad is this rank's own, others are summed: is its bucket sent, and written back after"
                " its wait?"
            )
        wrong(
            f"{at} {name}.grad is not the sum over the ranks: is the bucket filled when its last gradient has arrived"
            " and each written back to its own place after wait()?"
        )


def judge_overlap(found, where):
    """End the check if sums are not begun during backward, one a bucket."""
    for step, facts in enumerate(found[0]):
        at = f"{where}, step {step + 1}:"
        begun, end = facts["begun"], facts["end"]
        backward = COMPUTE * LAYERS
        if len(begun) != LAYERS:
            wrong(
                f"{at} {len(begun)} all-reduces for {LAYERS} buckets: one for each, of a flat array",
                points=min(1, len(begun)),
            )
        expected = [COMPUTE * (i + 1) for i in range(LAYERS)]
        if close(begun, expected) and close(end, backward + SUM):
            continue
        if all(t >= backward - 1e-9 for t in begun):
            wrong(
                f"{at} all sums begin when backward is over ({backward:.0f} s), and are exposed: begin each in the"
                " hook of its last gradient"
            )
        if end > backward + SUM + 1e-9 and begun[-1] > backward + 1e-9:
            wrong(
                f"{at} sums begin at {np.round(begun, 2)} s instead of {expected}: backward waits for each of them."
                " Keep the work, and wait for all when backward is over"
            )
        if begun[0] < COMPUTE - 1e-9:
            wrong(
                f"{at} a sum begins at {begun[0]:.2f} s, before its bucket is full: count its gradients down"
            )
        wrong(
            f"{at} sums begin at {np.round(begun, 2)} s instead of {expected}: as soon as its bucket is full"
        )


@lesson.check("a flat bucket and its views", points=3)
def check_bucket(run: Run):
    for shapes, dtype in (([(2, 3), (4,)], "float64"), ([(3,), (), (2, 2, 2), (0, 5), (1,)], "float32")):
        found = run(bucket, shapes, dtype)
        where = f"for shapes {shapes}:"
        n = sum(int(np.prod(shape)) for shape in shapes)
        if np.shape(found["flat"]) != (n,):
            wrong(
                f"{where} the flat array has shape {np.shape(found['flat'])}, all elements together are ({n},)"
            )
        if found["flat"].dtype != np.dtype(dtype):
            wrong(f"{where} the flat array is {found['flat'].dtype}, {dtype} was asked for")
        if [np.shape(view) for view in found["views"]] != [tuple(shape) for shape in shapes]:
            wrong(f"{where} the views have shapes {[np.shape(view) for view in found['views']]}")
        if not all(found["inside"]):
            i = found["inside"].index(False)
            wrong(
                f"{where} views[{i}] does not lie in the flat array: it is a copy, so what backward writes there is"
                " never sent. A slice of `flat`, reshaped, is a view; flatten(), concatenate and np.array copy"
            )
        if not found["zeros"]:
            wrong(f"{where} the flat array does not begin as zeros: np.empty holds whatever was there before")
        right = np.concatenate([np.full(int(np.prod(shape)), i + 1.0) for i, shape in enumerate(shapes)])
        if not close(found["flat"], right):
            if not all(np.all(view == i + 1) for i, view in enumerate(found["views"])):
                wrong(f"{where} views overlap: each begins where the one before ends")
            wrong(
                f"{where} the views do not lie one behind the other, in order, from the start of the flat array"
            )


@lesson.check("parameters are grouped from the last to the first", points=3)
def check_assign(run: Run):
    cases = (
        ([3, 3, 1, 2], 4, [[3, 2], [1], [0]]),
        ([1, 1, 1, 1], 100, [[3, 2, 1, 0]]),
        ([5, 1, 9, 2, 2], 4, [[4, 3], [2], [1], [0]]),
        ([2, 2, 2, 2], 1, [[3], [2], [1], [0]]),
        ([1, 3, 2, 1, 1], 4, [[4, 3, 2], [1, 0]]),
        ([], 8, []),
    )
    for sizes, limit, right in cases:
        got = run(assigned, sizes, limit)
        where = f"assign_buckets({sizes}, {limit}) gives {got!r:.80}"
        if not isinstance(got, list) or not all(isinstance(bucket, list) for bucket in got):
            wrong(f"{where}; a list of lists was expected")
        if got == right:
            continue
        flat = [i for bucket in got for i in bucket]
        if any(not bucket for bucket in got):
            wrong(
                f"{where}: there is an empty bucket. Begin a new one only when there is a parameter to put in"
            )
        lost = sorted(set(range(len(sizes))) - set(flat))
        if lost:
            large = (
                " It is larger than the limit, and gets a bucket of its own" if sizes[lost[0]] > limit else ""
            )
            wrong(f"{where}: parameter {lost[0]} is in no bucket, so its gradient is never summed.{large}")
        if flat == sorted(flat) and len(flat) > 1:
            wrong(
                f"{where}: from the first to the last. Backward reaches the last layer first: its bucket can be sent"
                " while the others are computed, so begin there"
            )
        over = [bucket for bucket in got if len(bucket) > 1 and sum(sizes[i] for i in bucket) > limit]
        if over:
            wrong(
                f"{where}: bucket {over[0]} has {sum(sizes[i] for i in over[0])} bytes, the limit is {limit}"
            )
        wrong(
            f"{where} instead of {right}: a bucket is closed only when the next parameter would take it above the limit"
        )


@lesson.check("when a step ends, and what is exposed", points=3)
def check_timeline(run: Run):
    cases = (
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5], 3.0, 3.5),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], 3.0, 7.0),
        ([1.0, 2.0], [0.1, 0.1], 5.0, 5.0),
        ([3.0, 1.0, 3.0], [1.0, 1.0, 0.5], 4.0, 5.5),
        ([], [], 2.0, 2.0),
    )
    for ready, seconds, backward, end in cases:
        got = run(timeline, ready, seconds, backward)
        where = f"full at {ready} s, sums of {seconds} s, backward {backward:g} s:"
        if not isinstance(got, tuple | list) or len(got) != 2:
            wrong(f"{where} (end, exposed) was expected, this came: {got!r:.60}")
        if close(list(map(float, got)), [end, end - backward]):
            continue
        said = float(got[0])
        each = [r + s for r, s in zip(ready, seconds)]
        by_ready, free = sorted(zip(ready, seconds)), 0.0
        for r, s in by_ready:
            free = max(free, r) + s
        queued = 0.0
        for r, s in zip(ready, seconds):
            queued = max(queued, r) + s
        if close(said, end):
            wrong(
                f"{where} the end is right, exposed is what comes after backward: {end - backward:g} s",
                2,
            )
        if close(said, backward + sum(seconds)):
            wrong(
                f"{where} {said:g} s is backward and then all sums: they run beside it, each from when it is full"
            )
        if close(said, queued) and said < backward:
            wrong(
                f"{where} {said:g} s is when the last sum ends; the step ends with backward, which takes longer here"
            )
        if close(said, max([backward, *each])):
            wrong(
                f"{where} {said:g} s: sums overlap each other there. A sum begins when the one before it is over"
            )
        if close(said, max(backward, free)):
            wrong(
                f"{where} {said:g} s: the buckets were sent as they became full. They go in the order of the list"
            )
        wrong(f"{where} the step ends at {end:g} s, not {said:g}: begin = max(bucket full, sum before over)")


@lesson.check("backward with sums of buckets: the sum over ranks on every rank", points=4)
def check_sums(run: Run):
    found = ended_well(run(overlapped, 2), "backward_with_overlap")
    judge_steps(found, "backward_with_overlap")
    if any(facts["hooks"] for of_rank in found for facts in of_rank):
        wrong(
            "hooks are left on the parameters: the next call would count with the old ones too. Call what"
            " register_hook returned",
            3,
        )
    found = ended_well(run(crossed), "where gradients arrive in another order on rank 1")
    right = [np.full((2, 2), factor * sum(1.0 + rank for rank in range(RANKS))) for factor in FACTORS]
    if not close(found, [right] * RANKS):
        wrong(
            "where gradients arrive in another order on rank 1, the sums of two buckets are mixed up: each rank began"
            " the bucket that was full first. Begin them in the order of the list: a full one waits for those before",
            points=2,
        )


@lesson.check("backward with sums of buckets: hidden behind backward", points=3)
def check_overlap(run: Run):
    found = ended_well(run(overlapped, 2), "backward_with_overlap")
    judge_overlap(found, "backward_with_overlap")


@lesson.check("bug hunt: gradients are summed in every step", points=4)
def check_object(run: Run):
    found = ended_well(run(object_steps, 3), "OverlappedGradients")
    judge_steps(found, "OverlappedGradients")
    judge_overlap(found, "OverlappedGradients")
