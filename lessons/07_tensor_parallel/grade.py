"""Lesson 07, the grader: linear layers, embedding, cross-entropy, convolution and attention over ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

import minipar
from minipar.grading import Lesson, Run, close, shaped, wrong

lesson = Lesson(7)
Array = np.ndarray
RANKS = 3


def calls_of(comm: Any) -> list[list[Any]]:
    """Return [operation, calls, elements] of this rank's ledger."""
    return [[row.operation, row.calls, row.elements] for row in comm.ledger.rows()]


def told(calls: list[list[Any]]) -> str:
    """Return the ledger in words."""
    return (
        ", ".join(f"{n} × {operation} ({elements} elements in all)" for operation, n, elements in calls)
        or "nothing"
    )


def same_everywhere(values: list[Array], what: str) -> None:
    """End the check unless all ranks returned the same."""
    for rank, value in enumerate(values):
        if not close(value, values[0]):
            wrong(f"{what} of rank {rank} differs from rank 0's, and every rank must have the whole result")


# --- column_row_mlp -----------------------------------------------------------------------------------------


@lesson.probe
def mlp(submission: Any, x: Array, parts: list[list[Array]], b2: Array, g: Array) -> Any:
    def one_rank() -> Any:
        comm = minipar.world()
        w1, b1, w2 = (part.copy() for part in parts[comm.rank])
        y, backward = submission.column_row_mlp(comm, x.copy(), w1, b1, w2, b2.copy())
        forward = calls_of(comm)
        comm.ledger.reset()
        return y, backward(g.copy()), forward, calls_of(comm)

    return minipar.launch(one_rank, ranks=len(parts), timeout=5)


def mlp_case() -> dict[str, Any]:
    """Return inputs, their parts, and the serial layer's values and gradients."""
    rng = np.random.default_rng(71)
    x, g = rng.normal(size=(5, 4)), rng.normal(size=(5, 3))
    w1, b1 = rng.normal(size=(7, 4)), rng.normal(size=7)
    w2, b2 = rng.normal(size=(3, 7)), rng.normal(size=3)
    cuts = [slice(0, 3), slice(3, 5), slice(5, 7)]
    h = np.maximum(x @ w1.T + b1, 0)
    dh = g @ w2 * (h > 0)
    return {
        "x": x, "g": g, "b2": b2, "y": h @ w2.T + b2, "dx": dh @ w1, "db2": g.sum(axis=0), "cuts": cuts,
        "parts": [[w1[c], b1[c], w2[:, c].copy()] for c in cuts],
        "grads": [(dh[:, c].T @ x, dh[:, c].sum(axis=0), g.T @ h[:, c]) for c in cuts],
        "terms": [dh[:, c] @ w1[c] for c in cuts],
        "terms_y": [h[:, c] @ w2[:, c].T for c in cuts],
    }  # fmt: skip


@lesson.check("the MLP's output is the serial one", points=3)
def check_mlp_forward(run: Run) -> None:
    case = mlp_case()
    got = run(mlp, case["x"], case["parts"], case["b2"], case["g"])
    ys = [shaped(y, case["y"].shape, np.float64, f"y of rank {r}") for r, (y, *_) in enumerate(got)]
    if close(ys, [case["y"]] * RANKS):
        return
    if close(ys, [term + case["b2"] for term in case["terms_y"]]):
        wrong("each rank returned its own features' term of y: the sum over ranks is missing")
    if close(ys[0], case["y"] + (RANKS - 1) * case["b2"]):
        wrong(
            f"b2 was added {RANKS} times, once by every rank before the sum: it is whole on every rank, so it is"
            " added once, to the sum",
            points=1,
        )
    if close(ys[0], case["y"] - case["b2"]):
        wrong("b2 is missing", points=1)
    same_everywhere(ys, "y")
    wrong(
        "y is not relu(x W1ᵀ + b1) W2ᵀ + b2: the ReLU acts on each rank's features, before anything is summed"
    )


@lesson.check("the MLP's gradients are the serial ones", points=4)
def check_mlp_backward(run: Run) -> None:
    case = mlp_case()
    got = run(mlp, case["x"], case["parts"], case["b2"], case["g"])
    for r, (_, grads, *_) in enumerate(got):
        if not isinstance(grads, list | tuple) or len(grads) != 5:
            wrong("backward must return five gradients: (dx, dw1, db1, dw2, db2)")
        dx, dw1, db1, dw2, db2 = grads
        for name, value, right in zip(("dw1", "db1", "dw2"), (dw1, db1, dw2), case["grads"][r]):
            value = shaped(value, right.shape, np.float64, f"{name} of rank {r}")
            if not close(value, right):
                times = next((n for n in (RANKS, 1 / RANKS) if close(value, right * n)), None)
                wrong(
                    f"{name} of rank {r} is not the gradient of its part"
                    + (f" but {times:g} times that" if times else "")
                    + ": no other rank holds this part, so nothing is summed over ranks"
                )
        if close(dx, case["terms"][r]):
            wrong(
                f"dx of rank {r} is its own features' term: the loss is right, and every layer below trains on a"
                " wrong gradient. All ranks read x, so the gradients of all ranks are summed",
                points=2,
            )
        if not close(dx, case["dx"]):
            wrong(f"dx of rank {r} is not the sum over ranks of (g W2 · (h > 0)) W1", points=1)
        if close(db2, RANKS * case["db2"]):
            wrong(
                "db2 is summed over ranks: g is the same everywhere, so each rank has the whole gradient",
                points=3,
            )
        if not close(db2, case["db2"]):
            wrong("db2 is not the sum of g over the samples", points=3)


@lesson.check("the MLP: one all-reduce each way", points=2)
def check_mlp_traffic(run: Run) -> None:
    case = mlp_case()
    got = run(mlp, case["x"], case["parts"], case["b2"], case["g"])
    for way, calls, size in (("forward", got[0][2], case["y"].size), ("backward", got[0][3], case["x"].size)):
        if calls == [["all_reduce", 1, size]]:
            continue
        if any(operation in ("all_gather", "gather") for operation, *_ in calls):
            wrong(
                f"{way}: {told(calls)}. Hidden features are needed by the rank that made them and by no other; cut"
                " W1 by output and W2 by input, and nothing is gathered between"
            )
        wrong(f"{way}: expected one all-reduce of {size} elements, the ledger shows {told(calls)}")


# --- vocabulary_embedding -----------------------------------------------------------------------------------


@lesson.probe
def embedding(submission: Any, table: Array, starts: list[int], ids: Array, g: Array) -> Any:
    def one_rank() -> Any:
        comm = minipar.world()
        start, stop = starts[comm.rank], starts[comm.rank + 1]
        y, backward = submission.vocabulary_embedding(comm, table[start:stop].copy(), ids.copy(), start)
        forward = calls_of(comm)
        comm.ledger.reset()
        return y, backward(g.copy()), forward, calls_of(comm)

    return minipar.launch(one_rank, ranks=len(starts) - 1, timeout=5)


@lesson.check("words are looked up in a table that lies on the ranks", points=3)
def check_embedding(run: Run) -> None:
    rng = np.random.default_rng(72)
    ids = np.array([9, 0, 4, 4, 6, 3, 9, 1, 4])
    for starts in ([0, 5, 10], [0, 4, 7, 10]):  # first two ranks: a negative index then finds a row
        judge_embedding(run, rng.normal(size=(10, 3)), starts, ids, rng.normal(size=(len(ids), 3)))


def judge_embedding(run: Run, table: Array, starts: list[int], ids: Array, g: Array) -> None:
    spans = list(pairwise(starts))
    here = [((ids >= a) & (ids < b))[:, None] for a, b in spans]
    got = run(embedding, table, starts, ids, g)
    ys = [shaped(y, g.shape, np.float64, f"y of rank {r}") for r, (y, *_) in enumerate(got)]
    if not close(ys, [table[ids]] * len(spans)):
        if close(ys, [np.where(mine, table[ids], 0) for mine in here]):
            wrong(
                "each rank returned its own words and zeros for the others: the sum over ranks is missing",
                points=1,
            )
        if close(ys[0], sum(table[a:b][np.clip(ids - a, 0, b - a - 1)] for a, b in spans)):
            wrong(
                "a word outside a rank's range was given the range's first or last row: it must contribute zeros"
            )
        found = [np.where((ids < b) & (ids >= 2 * a - b), ids - a, b - a) for a, b in spans]
        wrapped = sum(
            np.vstack([table[a:b], 0 * g[:1]])[np.where(i < 0, i + b - a, i)]
            for (a, b), i in zip(spans, found)
        )
        if close(ys[0], wrapped):
            wrong(
                "for a word below a rank's range ids - start is negative, and NumPy counts negative indices from the"
                " end, so a wrong row is added without an error: mask both sides"
            )
        wrong(
            "y is not table[ids]: a rank contributes its words' rows and zeros for all others, and ranks are summed"
        )
    whole, last = np.zeros_like(table), np.zeros_like(table)
    np.add.at(whole, ids, g)
    last[ids] = g
    for r, ((_, gradient, forward, backward), (a, b)) in enumerate(zip(got, spans)):
        gradient = shaped(gradient, (b - a, 3), np.float64, f"the gradient of rank {r}'s rows")
        if close(gradient, last[a:b]) and not close(gradient, whole[a:b]):
            wrong(
                "a word that occurs several times has only the gradient of its last use: `gradient[found] += g` adds"
                " once for each different row; np.add.at adds them all",
                points=2,
            )
        if not close(gradient, whole[a:b]):
            wrong(
                f"the gradient of rank {r}'s rows is not the sum of g over the places of each of its words", 1
            )
        if forward != [["all_reduce", 1, g.size]] or backward:
            wrong(
                f"expected one all-reduce of {g.size} elements in forward and nothing in backward; the ledger shows"
                f" {told(forward)}, then {told(backward)}",
                points=2,
            )


# --- vocabulary_cross_entropy -------------------------------------------------------------------------------


@lesson.probe
def loss(submission: Any, logits: Array, starts: list[int], targets: Array, g: Array) -> Any:
    def one_rank() -> Any:
        comm = minipar.world()
        start, stop = starts[comm.rank], starts[comm.rank + 1]
        mine = logits[:, start:stop].copy()
        with np.errstate(all="ignore"):
            losses, backward = submission.vocabulary_cross_entropy(comm, mine, targets.copy(), start)
            forward = calls_of(comm)
            comm.ledger.reset()
            return losses, backward(g.copy()), forward, calls_of(comm)

    return minipar.launch(one_rank, ranks=len(starts) - 1, timeout=5)


def serial_loss(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return the losses and the probabilities."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1)
    return np.log(total) - shifted[np.arange(len(targets)), targets], np.exp(shifted) / total[:, None]


STARTS = [0, 5, 8, 11]
SPANS = list(pairwise(STARTS))
TARGETS = np.array([0, 4, 5, 7, 8, 10])


@lesson.check("the cross-entropy over a cut vocabulary is exact", points=3)
def check_loss(run: Run) -> None:
    rng = np.random.default_rng(73)
    g = rng.normal(size=len(TARGETS))
    for scale in (2.0, 1e4):
        logits = rng.uniform(-scale, scale, (len(TARGETS), 11))
        right, _ = serial_loss(logits, TARGETS)
        got = run(loss, logits, STARTS, TARGETS, g)
        losses = [
            shaped(v, right.shape, np.float64, f"the losses of rank {r}") for r, (v, *_) in enumerate(got)
        ]
        if close(losses, [right] * RANKS):
            continue
        if not np.all(np.isfinite(losses[0])):
            wrong(
                f"losses are not finite for logits of ±{scale:,.0f}: exp overflows unless the largest logit of the"
                " whole sample is subtracted first",
                points=1,
            )
        here = [np.isin(TARGETS, range(a, b)) for a, b in SPANS]
        if any(
            close(losses[r][here[r]], right[here[r]]) and not close(losses[r], right) for r in range(RANKS)
        ):
            wrong(
                "a rank's losses are right only for targets of its own range: z_t must be summed over ranks, too"
            )
        tops = [logits[:, a:b].max(axis=1) for a, b in SPANS]
        total = sum(np.exp(logits[:, a:b] - top[:, None]).sum(axis=1) for (a, b), top in zip(SPANS, tops))
        target = logits[np.arange(len(TARGETS)), TARGETS]
        own = [np.log(total) - (target - top) for top in tops]
        mixed = np.log(total) - sum(np.where(h, target - top, 0) for h, top in zip(here, tops))
        if close(losses, [mixed] * RANKS) or close(losses, own):
            wrong(
                "each rank subtracted the largest of its own logits: the exponentials of different ranks are then"
                " scaled differently and cannot be added; take the maximum over ranks first"
            )
        same_everywhere(losses, "the losses")
        wrong(
            "the losses are not log Σ exp(z - m) - (z_t - m) with sum and maximum over the whole vocabulary"
        )


@lesson.check("the cross-entropy's gradient is probability minus target", points=3)
def check_loss_gradient(run: Run) -> None:
    rng = np.random.default_rng(74)
    logits, g = rng.normal(size=(len(TARGETS), 11)), rng.normal(size=len(TARGETS))
    _, probs = serial_loss(logits, TARGETS)
    onehot = np.eye(11)[TARGETS]
    got = run(loss, logits, STARTS, TARGETS, g)
    for r, (_, gradient, *_) in enumerate(got):
        cut = slice(STARTS[r], STARTS[r + 1])
        gradient = shaped(gradient, probs[:, cut].shape, np.float64, f"the gradient of rank {r}'s columns")
        if close(gradient, (probs - onehot)[:, cut] * g[:, None]):
            continue
        if close(gradient, (probs - onehot)[:, cut]):
            wrong("the gradient g of the losses is not multiplied in", points=2)
        if close(gradient, probs[:, cut] * g[:, None]):
            wrong(f"rank {r} did not subtract 1 at the targets of its range", points=1)
        own = np.exp(logits[:, cut])
        own /= own.sum(axis=1, keepdims=True)
        if close(gradient, (own - onehot[:, cut]) * g[:, None]):
            wrong("the probabilities are normalised over this rank's columns, not over the whole vocabulary")
        if close((gradient / g[:, None]).sum(axis=1), probs[:, cut].sum(axis=1) - 1):
            wrong(
                f"rank {r} subtracted 1 in every row, also where the target is another rank's word: only the rank"
                " that holds the target does"
            )
        wrong(f"the gradient of rank {r}'s columns is not g · (probability - target)")


@lesson.check("the cross-entropy gathers no logits", points=2)
def check_loss_traffic(run: Run) -> None:
    rng = np.random.default_rng(75)
    n = len(TARGETS)
    got = run(loss, rng.normal(size=(n, 11)), STARTS, TARGETS, np.ones(n))
    forward, backward = got[0][2], got[0][3]
    if any(operation in ("all_gather", "gather", "all_to_all", "broadcast") for operation, *_ in forward):
        wrong(f"the logits were sent ({told(forward)}): {n} × 11 here, gigabytes for a real vocabulary")
    if backward:
        wrong(
            f"backward communicated ({told(backward)}): after forward each rank knows the sum of exponentials, which"
            " is all it needs for its own columns",
            points=1,
        )
    if sum(elements for *_, elements in forward) > 3 * n:
        wrong(
            f"forward may all-reduce {3 * n} elements: maximum, sum, target; the ledger shows {told(forward)}",
            1,
        )


# --- convolve_rows ------------------------------------------------------------------------------------------


@lesson.probe
def convolution(submission: Any, image: Array, counts: list[int], kernel: Array) -> Any:
    def one_rank() -> Any:
        comm = minipar.world()
        start = sum(counts[: comm.rank])
        rows = image[start : start + counts[comm.rank]].copy()
        return submission.convolve_rows(comm, rows, kernel.copy()), calls_of(comm)

    return minipar.launch(one_rank, ranks=len(counts), timeout=5)


def convolved(image: Array, kernel: Array) -> Array:
    half = len(kernel) // 2
    padded = np.pad(image, ((half, half), (0, 0)))
    return sum(kernel[k] * padded[k : k + len(image)] for k in range(len(kernel)))


@lesson.check("a convolution by image region fetches its halo", points=4)
def check_convolution(run: Run) -> None:
    rng = np.random.default_rng(76)
    for counts, width in (([4, 3, 2, 3], 5), ([5], 3), ([2, 2], 3), ([3, 3, 2], 1)):
        image, kernel = rng.normal(size=(sum(counts), 4)), rng.normal(size=width)
        half, right = width // 2, convolved(image, kernel)
        got = run(convolution, image, counts, kernel)
        parts = np.split(image, np.cumsum(counts)[:-1])
        out = [
            shaped(y, (n, 4), np.float64, f"the rows of rank {r}")
            for r, ((y, _), n) in enumerate(zip(got, counts))
        ]
        found = np.concatenate(out)
        if not close(found, right):
            if close(found, np.concatenate([convolved(part, kernel) for part in parts])):
                wrong(
                    "at the seams zeros were read instead of the neighbours' rows: padding belongs to the border of"
                    " the whole image only"
                )
            if close(found, convolved(image, kernel[::-1])):
                wrong("the kernel is upside down: out[i] = Σ kernel[k] · image[i + k - K // 2]", points=1)
            inner = [slice(half, n - half) for n in counts]
            if all(close(y[s], r[s]) for y, r, s in zip(out, np.split(right, np.cumsum(counts)[:-1]), inner)):
                wrong(
                    "inside each part the result is right, at the seams it is not: from above comes the neighbour's"
                    f" last {half} rows, from below its first {half}",
                    points=1,
                )
            wrong("the result is not the convolution of the whole image")
        for r, (_, calls) in enumerate(got):
            neighbours = (r > 0) + (r + 1 < len(counts))
            sent = sum(elements for operation, _, elements in calls if operation == "send")
            others = [call for call in calls if call[0] not in ("send", "recv")]
            if others:
                wrong(
                    f"the result is right, but rank {r} used {told(others)}: a halo goes to the two neighbours, its"
                    " size does not depend on the number of ranks",
                    points=2,
                )
            if sent > neighbours * half * 4:
                wrong(
                    f"rank {r} sent {sent} elements; {half} rows to each of {neighbours} neighbours are"
                    f" {neighbours * half * 4}",
                    points=2,
                )


# --- attention ----------------------------------------------------------------------------------------------


@lesson.probe
def attended(submission: Any, x: Array, w_qkv: Array, w_out: Array, heads: int, ranks: int) -> Any:
    def one_rank() -> Any:
        comm = minipar.world()
        y = submission.attention(comm, x.copy(), w_qkv.copy(), w_out.copy(), heads)
        return y, calls_of(comm)

    return minipar.launch(one_rank, ranks=ranks, timeout=5)


def serial_attention(x: Array, q: Array, k: Array, v: Array, w_out: Array, head: int, scale: float) -> Array:
    """Return attention with these projections (C, C), cut into heads of a width, scores divided by `scale`."""
    t = len(x)
    parts = [(x @ w.T).reshape(t, -1, head).swapaxes(0, 1) for w in (q, k, v)]
    scores = parts[0] @ parts[1].swapaxes(1, 2) / scale
    scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=2, keepdims=True))
    probs /= probs.sum(axis=2, keepdims=True)
    return (probs @ parts[2]).swapaxes(0, 1).reshape(t, -1) @ w_out.T


@lesson.check("the bug hunt: attention on several ranks equals attention on one", points=4)
def check_attention(run: Run) -> None:
    rng = np.random.default_rng(77)
    for heads, ranks, width in ((4, 2, 16), (4, 4, 16), (2, 1, 8)):
        x, w_qkv = rng.normal(size=(5, width)), rng.normal(size=(3 * width, width)) * 0.5
        w_out, head = rng.normal(size=(width, width)), width // heads
        q, k, v = np.split(w_qkv, 3)
        right = serial_attention(x, q, k, v, w_out, head, head**0.5)
        got = run(attended, x, w_qkv, w_out, heads, ranks)
        ys = [shaped(y, right.shape, np.float64, f"the result of rank {r}") for r, (y, _) in enumerate(got)]
        same_everywhere(ys, "the result")
        if close(ys[0], right):
            calls = got[0][1]
            if ranks > 1 and calls != [["all_reduce", 1, right.size]]:
                wrong(
                    f"the result is right, with more traffic than one all-reduce of {right.size} elements:"
                    f" {told(calls)}",
                    points=2,
                )
            continue
        small = head // ranks
        if small and close(ys[0], serial_attention(x, q, k, v, w_out, small, small**0.5)):
            wrong(
                f"on {ranks} ranks there are {heads * ranks} heads of {small} features instead of {heads} of {head}:"
                " each rank has its part of the features, but divides it by all heads; on one rank both are the same"
            )
        for scale, name in (
            (small**0.5, "C/heads/ranks"),
            ((width / ranks) ** 0.5, "C/ranks"),
            (width**0.5, "C"),
        ):
            if close(ys[0], serial_attention(x, q, k, v, w_out, head, scale)):
                wrong(
                    f"the heads are right, the scale is not: scores are divided by √(C/heads), not √({name})",
                    2,
                )
        part = 3 * width // ranks
        straight = 0
        for r in range(ranks):
            thirds = np.split(w_qkv[r * part : (r + 1) * part], 3)
            columns = w_out[:, r * width // ranks : (r + 1) * width // ranks]
            straight = straight + serial_attention(x, *thirds, columns, head, head**0.5)
        if close(ys[0], straight):
            wrong(
                "the fused projection was cut straight through, so rank 0 took queries for keys and values: cut each"
                " of the three by itself"
            )
        if close(ys[0], right * ranks):
            wrong(
                f"the result is {ranks} times too large: every rank computed all heads, and all were summed"
            )
        wrong(
            f"the result on {ranks} ranks is not the serial one; follow the shapes of one head through the code"
        )
