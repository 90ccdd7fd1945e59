"""Grader of exercise 1."""

import warnings

import numpy as np

from minipar.grading import Lesson, Run, close, shaped, wrong

lesson = Lesson(1)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


# softplus -----------------------------------------------------------------------------------------------


@lesson.probe
def softplus_of(submission, x, g):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, vjp = submission.softplus(x)
        gradient = vjp(g)
    return {"y": y, "gradient": gradient, "warnings": [str(warning.message) for warning in caught]}


def logistic(x):
    return 0.5 * (1 + np.tanh(x / 2))


@lesson.check("softplus: value and gradient", points=2)
def check_softplus(run: Run):
    x, g = 2 * random(11, 3, 4), random(12, 3, 4)
    got = run(softplus_of, x, g)
    y = shaped(got["y"], x.shape, np.float64, "y of softplus")
    if not close(y, np.logaddexp(0, x)):
        wrong(
            f"y is {y.flat[0]:.6g} at x = {x.flat[0]:.6g}; log(1 + exp(x)) is {np.logaddexp(0, x.flat[0]):.6g}"
        )
    gradient = shaped(got["gradient"], x.shape, np.float64, "what vjp(g) of softplus returned")
    if close(gradient, g * logistic(x)):
        return
    if close(gradient, logistic(x)):
        wrong("vjp returned the derivative alone: the gradient that comes in, g, multiplies it", points=1)
    if close(gradient, g * y * (1 - y)) or close(gradient, g * logistic(x) * (1 - logistic(x))):
        wrong(
            "y (1 - y) is the derivative of the logistic function, not of softplus: what is d/dx log(1 + exp(x))?",
            points=1,
        )
    wrong(
        "y is right, the gradient is not: the derivative of log(1 + exp(x)) is exp(x) / (1 + exp(x)); compare yours"
        " with (softplus(x + h) - softplus(x - h)) / 2h at one x",
        points=1,
    )


@lesson.check("softplus: safe at ±10,000, and in float32", points=2)
def check_softplus_range(run: Run):
    x = np.array([-1e4, -800.0, -30.0, 0.0, 30.0, 800.0, 1e4])
    for dtype in (np.float64, np.float32):
        got = run(softplus_of, x.astype(dtype), np.ones(7, dtype))
        y = shaped(got["y"], x.shape, None, "y of softplus")
        gradient = shaped(got["gradient"], x.shape, None, "what vjp(g) of softplus returned")
        if not np.isfinite(y).all():
            at = x[~np.isfinite(y)][0]
            wrong(
                f"softplus({at:g}) overflows: exp(x) leaves the range of {np.dtype(dtype)} long before x = 1e4. Write"
                " it with exp(-|x|): log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))"
            )
        if not np.isfinite(gradient).all():
            at = x[~np.isfinite(gradient)][0]
            wrong(
                f"the gradient of softplus at {at:g} is not finite: exp(x) / (1 + exp(x)) is inf / inf for large x; use"
                " 1 / (1 + exp(-x)) there",
                points=1,
            )
        for name, value in (("y", y), ("the gradient", gradient)):
            if value.dtype != dtype:
                wrong(
                    f"{name} is {value.dtype} for x of {np.dtype(dtype)}: an array of another dtype widened it; a plain"
                    " Python number would not",
                    points=1,
                )
        tol = 1e-12 if dtype is np.float64 else 1e-6
        if not (close(y, np.logaddexp(0, x), tol) and close(gradient, logistic(x), tol)):
            wrong(
                "finite, but wrong for large |x|: softplus(x) is x for large x and 0 for very negative x",
                points=1,
            )
        if got["warnings"]:
            wrong(
                f"the results are right, but NumPy warns on the way ({got['warnings'][0]}): np.where computes both"
                " branches, so neither may overflow",
                points=1,
            )


# unbroadcast --------------------------------------------------------------------------------------------


@lesson.probe
def unbroadcast_all(submission, cases):
    return [submission.unbroadcast(g, tuple(shape)) for g, shape in cases]


def summed(g, shape):
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    return g.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


@lesson.check("unbroadcast: what was stretched is summed", points=3)
def check_unbroadcast(run: Run):
    g = random(21, 2, 3, 4)
    shapes = [(2, 3, 4), (3, 4), (4,), (), (3, 1), (2, 1, 4), (1, 3, 1), (1, 1)]
    got = run(unbroadcast_all, [(g, list(shape)) for shape in shapes])
    right = [summed(g, shape) for shape in shapes]
    if close(got, right):
        return
    bad = [i for i in range(len(shapes)) if not close(got[i], right[i])]
    shape, value = shapes[bad[0]], got[bad[0]]
    if value is None:
        wrong("unbroadcast returned None: was `return` forgotten?")
    mean = [close(got[i], right[i] * right[i].size / g.size) for i in bad]
    if all(mean):
        wrong(
            "the uses were averaged: each use of an element adds to its gradient, so they are summed",
            points=1,
        )
    value = np.asarray(value)
    ones = all(1 in shapes[i] for i in bad)
    if ones and value.shape != shape and value.ndim == len(shape):
        wrong(
            f"for shape {shape} the result has shape {value.shape}: axes of length 1 are stretched by broadcasting,"
            " too, not only those that are missing in front",
            points=1,
        )
    if value.shape != shape and value.size == max(int(np.prod(shape)), 1):
        wrong(
            f"for shape {shape} the result has shape {value.shape}: an axis of length 1 must stay; sum with"
            " keepdims=True there",
            points=1,
        )
    if value.shape != shape:
        wrong(
            f"for g of shape {g.shape} and shape {shape} the result has shape {value.shape}: first sum the"
            f" {g.ndim - len(shape)} axes in front that `shape` does not have, then those where it has length 1"
        )
    wrong(
        f"for shape {shape} the shape is right, the values are not: broadcasting aligns shapes at their last axes, so"
        " which axes of g were added?"
    )


# linear -------------------------------------------------------------------------------------------------


@lesson.probe
def linear_of(submission, x, weight, bias, g):
    y, vjp = submission.linear(x, weight, bias)
    return {"y": y, "gradients": vjp(g)}


@lesson.check("linear: value and three gradients", points=4)
def check_linear(run: Run):
    for inputs, outputs in ((3, 2), (4, 4)):  # square weights hide no transpose
        x, weight, bias = random(31, 5, inputs), random(32, outputs, inputs), random(33, outputs)
        g = random(34, 5, outputs)
        got = run(linear_of, x, weight, bias, g)
        y = shaped(got["y"], (5, outputs), None, "y of linear")
        if not close(y, x @ weight.T + bias):
            wrong("y is not x @ weight.T + bias: weight is (outputs, inputs), as in PyTorch")
        gradients = got["gradients"]
        if not isinstance(gradients, list | tuple) or len(gradients) != 3:
            wrong("vjp(g) of linear must return three gradients, by x, by weight and by bias", points=1)
        by_x, by_weight, by_bias = gradients
        if isinstance(by_weight, np.ndarray) and close(by_weight, x.T @ g) and inputs != outputs:
            wrong(
                f"the gradient by weight has shape {by_weight.shape}, that of weight.T: a gradient has the shape of"
                " what it is the gradient by, here (outputs, inputs): g.T @ x",
                points=2,
            )
        if close(by_bias, g.mean(axis=0)):
            wrong(
                "the gradient by bias is averaged over the batch: bias is added to each of the B rows, so the rows of g"
                " are summed; a mean belongs into the loss",
                points=3,
            )
        if close(by_bias, g):
            wrong(
                "the gradient by bias still has the batch in it: bias was broadcast over B rows (unbroadcast)",
                points=3,
            )
        by_x = shaped(by_x, x.shape, None, "the gradient by x")
        by_weight = shaped(by_weight, weight.shape, None, "the gradient by weight")
        by_bias = shaped(by_bias, bias.shape, None, "the gradient by bias")
        if not close(by_x, g @ weight):
            hint = (
                "g @ weight.T was used"
                if inputs == outputs and close(by_x, g @ weight.T)
                else "it is not g @ weight"
            )
            wrong(
                f"the gradient by x is wrong ({hint}): x meets weight.T on the way forward, so g meets weight"
                " on the way back",
                points=2,
            )
        if not close(by_weight, g.T @ x):
            mean = (
                ": it was divided by B, but the loss alone decides about a mean"
                if close(by_weight * 5, g.T @ x)
                else ""
            )
            wrong(
                f"the gradient by weight is not g.T @ x, the sum over all rows of the batch{mean}", points=2
            )
        if not close(by_bias, g.sum(axis=0)):
            wrong("the gradient by bias is not the sum of g over the batch", points=3)


# backward -----------------------------------------------------------------------------------------------


def step(kind, inputs, output, values, calls, changed):
    """Return one step of a tape of numbers, which counts its calls.

    Beside what its vjp is given and returns it keeps copies in `changed`, so that later changes are seen.
    """

    def vjp(g):
        calls[output] = calls.get(output, 0) + 1
        x = [values[i] for i in inputs]
        result = {
            "add": lambda: (g, g),  # the same array twice: nobody may write into it
            "multiply": lambda: (g * x[1], g * x[0]),
            "sine": lambda: (g * np.cos(x[0]),),
        }[kind]()
        changed.append((g, np.array(g)))
        changed.extend((part, np.array(part)) for part in result)
        return result

    return tuple(inputs), output, vjp


@lesson.probe
def backward_of(submission, kinds, values, output):
    """Run `backward` on a tape given as [kind, inputs, output] lists; values are arrays by number."""
    calls, changed = {}, []
    tape = [step(kind, inputs, out, values, calls, changed) for kind, inputs, out in kinds]
    gradients = submission.backward(tape, len(values), output)
    return {
        "gradients": gradients,
        "calls": max(calls.values(), default=0),
        "called": sorted(calls),
        "changed": sum(not np.array_equal(now, before) for now, before in changed),
    }


def forward(kinds, values):
    """Return all values of a tape whose inputs are `values`."""
    values = dict(enumerate(np.array(v) for v in values))
    for kind, inputs, out in kinds:
        function = {"add": np.add, "multiply": np.multiply, "sine": np.sin}[kind]
        values[out] = np.array(function(*(values[i] for i in inputs)))
    return [values[i] for i in range(len(values))]


def is_list_of(gradients, size):
    """End the check unless `backward` returned a list of so many gradients."""
    if not isinstance(gradients, list | tuple) or len(gradients) != size:
        wrong(
            f"backward must return a list with one entry for each of the {size} values, None where there is none"
        )
    return gradients


@lesson.check("backward: a chain, and a value used more than once", points=4)
def check_backward(run: Run):
    a, b = random(41, 2)
    chain = [["sine", [0], 1], ["multiply", [1, 1], 2]]  # sin(a)²
    got = run(backward_of, chain, forward(chain, [a]), 2, seconds=3)
    gradients = is_list_of(got["gradients"], 3)
    if close(gradients[0], np.sin(a) * np.cos(a)):
        wrong(
            "a value that is used twice keeps only one of its gradients: multiply(h, h) hands back two for the same h,"
            " and they add up"
        )
    if gradients[0] is None:
        wrong("no gradient reaches the first value: does the loop run from the newest step to the oldest?")
    if not close(gradients[0], 2 * np.sin(a) * np.cos(a)):
        wrong(
            "sin(a)² has the derivative 2 sin(a) cos(a), and backward gives another: print what each vjp is given"
        )
    # a² (a + b): a is used by two steps, and the sum by one that is newer than both
    shared = [["multiply", [0, 0], 2], ["add", [0, 1], 3], ["multiply", [2, 3], 4]]
    got = run(backward_of, shared, forward(shared, [a, b]), 4, seconds=3)
    gradients, right = is_list_of(got["gradients"], 5), [3 * a * a + 2 * a * b, a * a]
    if close(gradients[0], 2 * a * (a + b)) or close(gradients[0], a * a):
        wrong(
            "two steps use the same value, and the gradient from one of them replaced that of the other: add",
            points=1,
        )
    if not close(gradients[0], right[0]):
        wrong(
            "the gradient of a² (a + b) by a is wrong: a value's own step may only run once the gradients from all of"
            " its uses have arrived; which order of steps makes sure of that?",
            points=1,
        )
    if not close(gradients[1], right[1]):
        wrong(
            "the gradient by b changed when another value received one: an array from a vjp was added to in place, and"
            " add returns the same array twice",
            points=2,
        )


@lesson.check("backward: each vjp once, nothing overwritten, nothing in vain", points=2)
def check_backward_economy(run: Run):
    doubled = [["add", [i, i], i + 1] for i in range(40)]  # h = h + h, 40 times: 2^40 paths
    got = run(backward_of, doubled, forward(doubled, [1.0]), 40, seconds=3)
    if not close(is_list_of(got["gradients"], 41)[0], 2.0**40):
        wrong(
            "h = h + h forty times has the derivative 2^40, and backward gives another: gradients of one value add up"
        )
    if got["calls"] > 1:
        wrong(f"a vjp was called {got['calls']} times: once, with the sum of the gradients from all uses")
    a = random(42, 3)  # arrays: += would write into them
    kinds = [["multiply", [0, 0], 3], ["add", [0, 1], 4], ["multiply", [1, 2], 5], ["multiply", [3, 4], 6]]
    values = forward(kinds, [a, a + 1, a + 2])
    got = run(backward_of, kinds, values, 6, seconds=3)
    if got["changed"]:
        wrong(
            "an array that a vjp returned or was given has been changed: `+=` writes into it, and it may be somebody"
            " else's gradient; make a new array, x = x + g",
            points=1,
        )
    gradients = is_list_of(got["gradients"], 7)
    if 5 in got["called"] or gradients[5] is not None or gradients[2] is not None:
        wrong(
            "values 2 and 5 have no part in the output: their gradients are None, and the vjp of step 5 is not called",
            points=1,
        )


@lesson.check("backward: 5,000 steps deep", points=1)
def check_backward_deep(run: Run):
    depth = 5000
    kinds = [["add", [i, i], i + 1] if i < 3 else ["sine", [i], i + 1] for i in range(depth)]
    values = forward(kinds, [0.01])
    right = 8.0 * np.prod(np.cos(values[3:-1]))
    try:
        got = run(backward_of, kinds, values, depth, seconds=6)
    except Exception as failure:
        if "calls itself without end" in str(failure):
            wrong(
                "5,000 steps are too deep for recursion, Python allows about 1,000: use a loop over the tape"
            )
        raise
    if not close(is_list_of(got["gradients"], depth + 1)[0], right):
        wrong(
            "the gradient through 5,000 steps is wrong, though short tapes may be right: is every step visited?"
        )


# The bug hunt -------------------------------------------------------------------------------------------


@lesson.probe
def tape_of(submission, program, inputs):
    """Run [operation, a, b] lists on a Tape and return the gradients of the last value."""
    tape = submission.Tape()
    for x in inputs:
        tape.value(x)
    last = 0
    for operation, a, b in program:
        last = getattr(tape, operation)(a, b)
    return list(tape.gradients(last))


@lesson.check("the bug hunt: Tape", points=4)
def check_tape(run: Run):
    a, b = random(51, 3), random(52, 3)
    simple = run(tape_of, [["multiply", 0, 1], ["add", 2, 0]], [a, b])  # a b + a
    if len(simple) != 4 or not close(simple[:2], [b + 1, a]):
        wrong(
            "Tape was right for a * b + a, and is no longer: a gradient from a second use adds to the first"
        )
    got = run(tape_of, [["multiply", 0, 0], ["add", 0, 1], ["multiply", 2, 3]], [a, b])  # a² (a + b)
    if len(got) != 5 or not close(got[0], 3 * a * a + 2 * a * b):
        wrong(
            "the gradient of a² (a + b) by a is wrong, which it was not before: the gradients of all uses add up"
        )
    if not close(got[1], a * a):
        wrong(
            "the gradient of a² (a + b) by b is still wrong: it equals that by a. `add` gives both inputs the same"
            " array, and then one of them is added to in place. Which line may write into an array"
            " that it does not own?"
        )
    if not close(got[3], a * a):
        wrong(
            "the gradient by a + b itself was changed after its step had run: it shares an array, too",
            points=2,
        )
    twice = run(tape_of, [["add", 0, 0]], [a])
    if not close(twice, [2 + 0 * a, 1 + 0 * a]):
        wrong(
            "for y = a + a, the gradient by y itself must stay 1, and by a be 2: they are different arrays",
            points=2,
        )
