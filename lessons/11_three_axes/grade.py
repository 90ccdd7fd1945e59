"""Lesson 11, grading: meshes of several shapes, norms with every way to count wrong, boxes that do not line up."""

import math
from itertools import pairwise

import numpy as np

import minipar
from minipar.errors import CommunicationError
from minipar.grading import Lesson, Run, close, shaped, wrong

lesson = Lesson(11, forbidden=("minipar.mesh", "minipar.Mesh", "minipar.checkpoint"))
MESHES = ((2, 2, 2), (2, 1, 2), (1, 3, 2), (2, 2, 1))


# What runs beside the submission ------------------------------------------------------------------------------


@lesson.probe
def places(submission, dp, pp, tp):
    return [submission.place(rank, dp, pp, tp) for rank in range(dp * pp * tp)]


@lesson.probe
def groups(submission, dp, pp, tp):
    def one_rank():
        comm = minipar.world()
        before = comm.ledger.calls()
        found = submission.axes(comm, dp, pp, tp)
        calls = comm.ledger.calls() - before
        return {"axes": [(list(group.members), group.rank) for group in found], "calls": calls}

    try:
        return {"ranks": minipar.launch(one_rank, ranks=dp * pp * tp, timeout=5)}
    except CommunicationError as error:
        return {"stuck": str(error)}


@lesson.probe
def norm(submission, held):
    def one_rank():
        comm = minipar.world()
        mine = [(g.copy(), copies) for g, copies in held[comm.rank]]
        with np.errstate(over="ignore", invalid="ignore"):
            answer = submission.gradient_norm(comm, mine)
        changed = any(not np.array_equal(a, b) for (a, _), (b, _) in zip(mine, held[comm.rank]))
        return {"norm": answer, "sent": (comm.ledger.calls(), comm.ledger.elements()), "changed": changed}

    try:
        return {"ranks": minipar.launch(one_rank, ranks=len(held), timeout=5)}
    except CommunicationError as error:
        return {"stuck": str(error)}


@lesson.probe
def boxes(submission, shape, dim, parts, ranks):
    return [submission.shard_boxes(tuple(shape), dim, parts, ranks, rank) for rank in range(ranks)]


@lesson.probe
def build(submission, blocks, box):
    blocks = [(tuple(tuple(pair) for pair in there), array) for there, array in blocks]
    box = tuple(tuple(pair) for pair in box)
    try:
        out = submission.assemble(blocks, box)
    except ValueError as error:  # the promised refusal, or one of NumPy's
        return {"refused": str(error) or "no text"}
    kept = isinstance(out, np.ndarray) and any(np.shares_memory(out, array) for _, array in blocks)
    return {"array": out, "shares": kept}


@lesson.probe
def cut_anew(submission, parts, dim, fused, ranks):
    return submission.recut(parts, dim, fused, ranks)


# What judges ----------------------------------------------------------------------------------------------------


def right_place(rank, dp, pp, tp):
    return rank // (pp * tp), rank // tp % pp, rank % tp


@lesson.check("where each rank stands", points=2)
def check_place(run: Run):
    for dp, pp, tp in (*MESHES, (2, 3, 4)):
        found = run(places, dp, pp, tp)
        if any(not isinstance(where, list | tuple) or len(where) != 3 for where in found):
            wrong(f"place must return three numbers, (d, p, t); it returned {found[0]!r:.60}")
        got = [tuple(int(i) for i in where) for where in found]
        ranks = range(dp * pp * tp)
        right = [right_place(r, dp, pp, tp) for r in ranks]
        if got == right:
            continue
        if got == [(r % dp, r // dp % pp, r // (dp * pp)) for r in ranks]:
            wrong("place: data-parallel neighbours are adjacent; rank and rank + 1 must differ in t, the tensor axis")
        if got == [(r // tp // pp, r // tp % pp, r % tp)[::-1] for r in ranks]:
            wrong("place: the order of the three is (d, p, t), you return (t, p, d)")
        if got == [(r // (dp * tp), r // tp % dp, r % tp) for r in ranks] or got == [
            (r // tp % dp, r // (dp * tp), r % tp) for r in ranks
        ]:
            wrong("place: the stages of a pipeline come before the replicas: from rank to rank first t, then p, then d")
        r = next(r for r in ranks if got[r] != right[r])
        call = f"place({r}, dp={dp}, pp={pp}, tp={tp})"
        wrong(f"{call} should be {right[r]}, not {got[r]}; rank = (d · pp + p) · tp + t", points=1)


@lesson.check("a communicator for each axis", points=3)
def check_axes(run: Run):
    for dp, pp, tp in MESHES:
        found = run(groups, dp, pp, tp)
        if "stuck" in found:
            wrong(f"axes: the ranks do not all call the same splits in the same order: {found['stuck']:.200}")
        n = dp * pp * tp
        where = [right_place(r, dp, pp, tp) for r in range(n)]
        for rank, told in enumerate(found["ranks"]):
            for axis, (members, mine) in enumerate(told["axes"]):
                name = ("dp", "pp", "tp")[axis]
                others = [i for i in range(3) if i != axis]
                right = [r for r in range(n) if all(where[r][i] == where[rank][i] for i in others)]
                mesh = f"on dp {dp} × pp {pp} × tp {tp}"
                if members == right and mine == where[rank][axis]:
                    continue
                if sorted(members) == right:
                    wrong(
                        f"axes: the {name} group of rank {rank} {mesh} has the right ranks in another order, {members};"
                        " the key orders them: pass the index along the axis",
                        points=2,
                    )
                if len(right) == 1:
                    wrong(
                        f"axes: the {name} group of rank {rank} {mesh} is {members}. Along an axis of length one a rank"
                        " is alone: its group there is itself. Split it off like the others"
                    )
                if members == [r for r in range(n) if where[r][axis] == where[rank][axis]]:
                    wrong(
                        f"axes: the {name} group of rank {rank} {mesh} is {members}, the ranks that stand at the same"
                        f" {name} index. It should be {right}: those that *differ* in it and share the two others"
                    )
                if set(right) < set(members):
                    wrong(
                        f"axes: the {name} group of rank {rank} {mesh} is {members} and should be {right}: two groups"
                        " got one colour. Make the colour of both indices that a group shares, so that no two are equal"
                    )
                wrong(f"axes: the {name} group of rank {rank} {mesh} should be {right}, it is {members}")
            if told["calls"] != 3:
                wrong(f"axes communicated {told['calls']} times; three splits are enough", points=2)


def norm_cases():
    """Return (name, each rank's list of (gradient, copies), norm) for meshes of four ranks, dp 2 × tp 2."""
    rng = np.random.default_rng(11)

    def g(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    alone = [g(3, 2), g(2), g(4), g(1)]
    yield "parts that no other rank holds", [[(x, 1)] for x in alone], alone
    whole = g(5)
    yield "a replica on every rank", [[(whole, 4)]] * 4, [whole]
    left, right, shared = g(2, 3), g(2, 3), g(3)
    held = [[(half, 2), (shared, 4)] for half in (left, right, left, right)]  # ranks (d, t): t is the cut
    yield "a weight cut over two ranks and a shared norm, in two replicas", held, [left, right, shared]
    one, tied = g(4), 1e30 * g(3)
    yield "stages with unequal lists, and a gradient of 1e30", [[(one, 1), (tied, 2)], [], [(tied, 2)], []], [one, tied]


def norms_of(held, mistake=""):
    """Return each rank's norm, right or with one of the ways to count wrong."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = [[(float(np.sum(g.astype(np.float64) ** 2)), c) for g, c in mine] for mine in held]
        weighed = [sum(s / c for s, c in mine) for mine in squares]
        plain = [sum(s for s, _ in mine) for mine in squares]
        if mistake == "local":
            return [math.sqrt(s) for s in plain]
        if mistake == "all copies":
            return [math.sqrt(sum(plain))] * len(held)
        if mistake == "sum of norms":
            return [sum(math.sqrt(s) for s in weighed)] * len(held)
        if mistake == "no root":
            return [sum(weighed)] * len(held)
        if mistake == "norms over copies":
            return [math.sqrt(sum(s / c**2 for mine in squares for s, c in mine))] * len(held)
        if mistake == "mean":
            return [math.sqrt(sum(plain) / len(held))] * len(held)
        if mistake == "float32":
            low = sum(float(np.sum(g * g)) / c for mine in held for g, c in mine)
            return [math.sqrt(low)] * len(held)
    return [math.sqrt(sum(weighed))] * len(held)


NORM_MISTAKES = {
    "local": "each rank returns the norm of what it holds itself; add the squares up over the ranks first",
    "all copies": "what several ranks hold is counted once for each of them; let each of its `copies` holders add its"
    " square divided by `copies`",
    "sum of norms": "norms do not add up, their squares do: sum first, then the root",
    "no root": "the square root is missing",
    "norms over copies": "the gradient is divided by `copies` before it is squared; divide the square",
    "mean": "the sum of squares is divided by the number of ranks, which is right only if all hold all of it; each"
    " array has its own number of copies",
    "float32": "the square of 1e30 is infinite in float32; cast to float64 before squaring",
}


@lesson.check("the norm of a gradient that lies all over the mesh", points=4)
def check_norm(run: Run):
    sent = []  # by every rank of every case
    for name, held, distinct in norm_cases():
        found = run(norm, held)
        if "stuck" in found:
            wrong(
                f"gradient_norm of {name}: the ranks do not all call the same collective. Their lists differ, so add up"
                f" what each one has first, and call one all-reduce even if it has nothing ({found['stuck']:.140})"
            )
        if any(rank["changed"] for rank in found["ranks"]):
            wrong("gradient_norm changes the gradients that it is given", points=3)
        got = [rank["norm"] for rank in found["ranks"]]
        right = [math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in distinct))] * len(held)
        if not close(got, right, 1e-6):
            for mistake, text in NORM_MISTAKES.items():
                answer = norms_of(held, mistake)
                if close(got, answer, 1e-6) and not close(answer, right, 1e-6):
                    wrong(f"gradient_norm of {name}: {text}", points=2 if mistake == "float32" else 1)
            wrong(f"gradient_norm of {name}: expected {right[0]:g} on every rank, got {got}")
        sent += [rank["sent"] for rank in found["ranks"]]
    for calls, elements in sent:
        if (calls, elements) != (1, 1):
            wrong(
                f"gradient_norm made {calls} calls on {elements} elements; one all-reduce of one number is enough, add"
                " up on each rank first",
                points=2,
            )


def right_boxes(shape, dim, parts, ranks, rank):
    block = shape[dim] // parts
    size, out = block // ranks, []
    for k in range(parts):
        box = [(0, n) for n in shape]
        box[dim] = (k * block + rank * size, k * block + (rank + 1) * size)
        out.append(tuple(box))
    return out


def as_boxes(value, shape, what):
    """Return a list of boxes of plain numbers; another form is wrong."""
    try:
        found = [tuple((int(start), int(stop)) for start, stop in box) for box in value]
    except (TypeError, ValueError):
        wrong(f"{what} must be a list of boxes such as {[tuple((0, n) for n in shape)]}; it is {value!r:.80}")
    if any(len(box) != len(shape) for box in found):
        wrong(f"{what}: a box has one (start, stop) for each axis, {len(shape)} here; got {found[0]}")
    return found


@lesson.check("the boxes of a tensor-parallel rank", points=4)
def check_boxes(run: Run):
    for shape, dim, parts, ranks in (((6, 4), 0, 1, 3), ((4, 8), 1, 1, 2), ((12, 2), 0, 3, 2), ((2, 3, 24), 2, 3, 4)):
        got = run(boxes, shape, dim, parts, ranks)
        for rank in range(ranks):
            what = f"shard_boxes({shape}, dim={dim}, groups={parts}, ranks={ranks}, rank={rank})"
            mine, right = as_boxes(got[rank], shape, what), right_boxes(shape, dim, parts, ranks, rank)
            if mine == right:
                continue
            size = shape[dim] // ranks
            flat = [list((0, n) for n in shape)]
            flat[0][dim] = (rank * size, (rank + 1) * size)
            if parts > 1 and mine == [tuple(flat[0])]:
                wrong(
                    f"{what} is one range of the whole weight. It is fused: this rank would get all of the queries and"
                    " none of the values; cut each block by itself",
                    points=2,
                )
            if parts > 1 and mine == right[:1]:
                wrong(f"{what}: only the first block's box is there; a rank holds a range of every block", 2)
            if sorted(mine) == sorted(right):
                wrong(f"{what}: the boxes are right and in another order; the blocks' order is meant", points=3)
            if [tuple((a, b + 1) for a, b in box) for box in mine] == right or all(
                m[dim][1] + 1 == r[dim][1] and m[dim][0] == r[dim][0] for m, r in zip(mine, right)
            ):
                wrong(f"{what}: stop is not included; (0, 2) are the indices 0 and 1", points=2)
            if len(shape) == 2 and mine == right_boxes(shape[::-1], 1 - dim, parts, ranks, rank) != right:
                wrong(f"{what}: the axes are exchanged")
            if all(m[1 - dim if len(shape) == 2 else 0] == (0, 0) for m in mine):
                wrong(f"{what}: along the axes that are not cut a box reaches from 0 to the end")
            wrong(f"{what} should be {right}, it is {mine}")


def stored(whole, cuts):
    """Return a matrix as blocks, cut at the given rows and columns."""
    rows, columns = ([0, *c, n] for c, n in zip(cuts, whole.shape))
    return [
        (((a, b), (c, d)), whole[a:b, c:d].copy())
        for a, b in pairwise(rows)
        for c, d in pairwise(columns)
    ]


@lesson.check("a box out of blocks that lie anywhere", points=4)
def check_assemble(run: Run):
    rng = np.random.default_rng(12)
    whole = rng.standard_normal((6, 8)).astype(np.float32)
    cases = (
        ("the same box as was stored", stored(whole, ((3,), ())), ((3, 6), (0, 8))),
        ("two blocks joined", stored(whole, ((3,), ())), ((0, 6), (0, 8))),
        ("rows stored, columns wanted", stored(whole, ((2, 4), ())), ((0, 6), (2, 5))),
        ("a box across four blocks", stored(whole, ((2,), (3,))), ((1, 5), (1, 7))),
        ("a part of one block", stored(whole, ((4,), (4,))), ((1, 3), (5, 8))),
    )
    for name, blocks, box in cases:
        found = run(build, blocks, box)
        if "refused" in found:
            wrong(
                f"assemble of {name}: ValueError ({found['refused']:.160}), though every element is stored. If it is"
                " yours: how are missing ones counted? If it is NumPy's: have both sides of the copy one shape?",
                points=1,
            )
        right = whole[tuple(slice(*pair) for pair in box)]
        got = shaped(found["array"], right.shape, np.float32, f"assemble of {name}")
        if found["shares"]:
            wrong(f"assemble of {name} returns a view of a stored block; copy it into a fresh array", points=3)
        if not close(got, right, 0):
            if name.startswith("the same") or name.startswith("a part"):
                wrong(
                    f"assemble of {name}: the elements are others. An index into the block counts from where the"
                    " *block* begins, one into the result from where the *box* begins",
                    points=1,
                )
            wrong(
                f"assemble of {name}: {int((got != right).sum())} of {right.size} elements are wrong; copy only what"
                " block and box have in common, to where it belongs in the box",
                points=1,
            )
    number = run(build, [((), np.array(7.0))], ())
    raised = f"; it raised ValueError ({number['refused']:.160})" if "refused" in number else ""
    if raised or not close(number["array"], np.array(7.0)):
        wrong(f"assemble: a number is an array of no axis, its box is () and holds one element{raised}", points=3)
    holed = stored(whole, ((2, 4), ()))
    for name, blocks in (("a block is missing", holed[::2]), ("only blocks elsewhere", holed[:1])):
        found = run(build, blocks, ((1, 5), (0, 8)) if len(blocks) == 2 else ((4, 6), (0, 8)))
        if "refused" not in found:
            wrong(
                f"assemble ({name}): elements that are in no block were returned all the same, whatever they hold."
                " Count what was copied, and raise ValueError: a silent zero is a wrong weight",
                points=2,
            )


def cut(whole, dim, parts, ranks):
    """Return each rank's part of a weight, its groups joined."""
    out = []
    for rank in range(ranks):
        spans = [box[dim] for box in right_boxes(whole.shape, dim, parts, ranks, rank)]
        out.append(np.concatenate([np.take(whole, range(*span), axis=dim) for span in spans], axis=dim))
    return out


@lesson.check("the bug hunt: fused weights on another number of ranks", points=3)
def check_hunt(run: Run):
    rng = np.random.default_rng(13)
    for shape, dim, parts, before, after in (
        ((8, 3), 0, 1, 2, 4),
        ((24, 2), 0, 3, 2, 4),
        ((2, 24), 1, 3, 4, 1),
        ((12, 2), 0, 3, 2, 2),
        ((16, 2), 0, 2, 1, 4),
    ):
        whole = rng.standard_normal(shape)
        got = run(cut_anew, cut(whole, dim, parts, before), dim, parts, after)
        what = f"recut of a {shape} weight of {parts} blocks, from {before} to {after} ranks"
        right = cut(whole, dim, parts, after)
        if close(got, right, 0):
            continue
        if not isinstance(got, list | tuple) or len(got) != after:
            wrong(f"{what} must return a list of {after} arrays")
        for rank in range(after):
            shaped(got[rank], right[rank].shape, None, f"{what}, rank {rank}")
        joined = np.concatenate(cut(whole, dim, parts, before), axis=dim)
        if close(got, cut(joined, dim, parts, after), 0):
            wrong(
                f"{what}: queries, keys and values are mixed. Each part holds a range of every block, so the parts laid"
                " one after the other are not the weight: rank 1's queries come after rank 0's values"
            )
        if close(got, np.split(whole, after, axis=dim), 0):
            wrong(
                f"{what}: the weight is put together rightly, and cut as if it were not fused; the new ranks need a"
                " range of every block",
                points=1,
            )
        wrong(f"{what}: the elements are right in number and stand elsewhere; follow one row of the second block", 1)
