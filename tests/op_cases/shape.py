"""Cases of the primitives that move elements, and of the reductions."""

import numpy as np

from minipar import ops
from tests.op_cases.case import Case, Cases

IDS = np.array([[0, 2, 2], [1, 0, 1]])
ROWS = np.array([2, 0, 2, 2])
KEEP = np.array([True, False, True])

SHAPE: Cases = {
    "broadcast_to": [
        Case(lambda x: ops.broadcast_to(x, (4, 3)), ((3,),), lambda T, x: x.expand(4, 3)),
        Case(lambda x: ops.broadcast_to(x, (2, 3, 5)), ((3, 1),), lambda T, x: x.expand(2, 3, 5)),
        Case(lambda x: ops.broadcast_to(x, (2, 0)), ((2, 1),), lambda T, x: x.expand(2, 0)),
        Case(lambda x: ops.broadcast_to(x, (2, 3)), ((),), lambda T, x: x.expand(2, 3)),
    ],
    "chunk": [
        Case(lambda x: ops.chunk(x, 3, 1), ((2, 7),), lambda T, x: T.chunk(x, 3, 1)),
        Case(lambda x: ops.chunk(x, 2, -1), ((2, 6),), lambda T, x: T.chunk(x, 2, -1)),
        Case(lambda x: ops.chunk(x, 5, 0), ((2, 3),), lambda T, x: T.chunk(x, 5, 0)),
    ],
    "concat": [
        Case(lambda a, b: ops.concat([a, b]), ((2, 3), (4, 3)), lambda T, a, b: T.cat([a, b])),
        Case(lambda a, b, c: ops.concat([a, b, c], -1), ((2, 1), (2, 0), (2, 3)), lambda T, *t: T.cat(t, -1)),
        Case(lambda a: ops.concat([a, a], 1), ((2, 3),), lambda T, a: T.cat([a, a], 1)),
    ],
    "contiguous": [Case(lambda x: ops.contiguous(x.T), ((2, 3),), lambda T, x: x.T.contiguous())],
    "flatten": [
        Case(lambda x: ops.flatten(x, 1), ((2, 3, 4),), lambda T, x: T.flatten(x, 1)),
        Case(lambda x: ops.flatten(x), ((2, 0, 4),), lambda T, x: T.flatten(x)),
        Case(lambda x: ops.flatten(x, 1), ((0, 3, 4),), lambda T, x: T.flatten(x, 1)),
        Case(lambda x: ops.flatten(x), ((),), lambda T, x: T.flatten(x)),
    ],
    "flip": [
        Case(lambda x: ops.flip(x, 1), ((2, 3),), lambda T, x: T.flip(x, (1,))),
        Case(lambda x: ops.flip(x, (0, -1)), ((2, 3, 2),), lambda T, x: T.flip(x, (0, -1))),
    ],
    "gather": [
        Case(lambda x: ops.gather(x, IDS, 1), ((2, 4),), lambda T, x: T.gather(x, 1, T.tensor(IDS))),
        Case(lambda x: ops.gather(x, IDS, -1), ((2, 3),), lambda T, x: T.gather(x, -1, T.tensor(IDS))),
        Case(lambda x: ops.gather(x, IDS, 0), ((3, 3),), lambda T, x: T.gather(x, 0, T.tensor(IDS))),
    ],
    "getitem": [
        Case(lambda x: x[1], ((3, 4),), lambda T, x: x[1]),
        Case(lambda x: x[-1, 2], ((3, 4),), lambda T, x: x[-1, 2]),
        Case(lambda x: x[:, 1::2], ((3, 5),), lambda T, x: x[:, 1::2]),
        Case(lambda x: x[..., None, 0], ((3, 4),), lambda T, x: x[..., None, 0]),
        Case(lambda x: x[2:2], ((3, 4),), lambda T, x: x[2:2]),
        Case(lambda x: x[ROWS], ((3, 4),), lambda T, x: x[T.tensor(ROWS)]),
        Case(lambda x: x[[0, 0, 1]], ((3, 4),), lambda T, x: x[[0, 0, 1]]),
        Case(lambda x: x[KEEP], ((3, 4),), lambda T, x: x[T.tensor(KEEP)]),
        Case(lambda x: x[:, ROWS], ((2, 3),), lambda T, x: x[:, T.tensor(ROWS)]),
        Case(lambda x: x[ROWS, ROWS], ((3, 4),), lambda T, x: x[T.tensor(ROWS), T.tensor(ROWS)]),
        Case(lambda x: x[...], ((),), lambda T, x: x[...]),
    ],
    "pad": [
        Case(
            lambda x: ops.pad(x, ((1, 2), (0, 3))),
            ((2, 3),),
            lambda T, x: T.nn.functional.pad(x, (0, 3, 1, 2)),
        ),
        Case(
            lambda x: ops.pad(x, ((2, 0),), -1.0),
            ((3,),),
            lambda T, x: T.nn.functional.pad(x, (2, 0), value=-1.0),
        ),
    ],
    "permute": [
        Case(lambda x: ops.permute(x, (2, 0, 1)), ((2, 3, 4),), lambda T, x: x.permute(2, 0, 1)),
        Case(lambda x: x.permute(-1, 0, 1), ((2, 3, 4),), lambda T, x: x.permute(-1, 0, 1)),
    ],
    "reshape": [
        Case(lambda x: ops.reshape(x, (3, -1)), ((2, 6),), lambda T, x: x.reshape(3, -1)),
        Case(lambda x: x.reshape(1, 1), ((),), lambda T, x: x.reshape(1, 1)),
        Case(lambda x: x.reshape(()), ((1,),), lambda T, x: x.reshape(())),
        Case(lambda x: x.reshape(0, 5), ((2, 0),), lambda T, x: x.reshape(0, 5)),
        Case(lambda x: x.T.reshape(6), ((2, 3),), lambda T, x: x.T.reshape(6)),
    ],
    "roll": [
        Case(lambda x: ops.roll(x, 2, 1), ((2, 5),), lambda T, x: T.roll(x, 2, 1)),
        Case(lambda x: ops.roll(x, (1, -2), (0, 1)), ((3, 5),), lambda T, x: T.roll(x, (1, -2), (0, 1))),
    ],
    "split": [
        Case(lambda x: ops.split(x, [1, 0, 4], 1), ((2, 5),), lambda T, x: T.split(x, [1, 0, 4], 1)),
        Case(lambda x: ops.split(x, 2, -1), ((2, 5),), lambda T, x: T.split(x, 2, -1)),
        Case(lambda x: ops.split(x, [1, 2, 2], 1)[1], ((2, 5),), lambda T, x: T.split(x, [1, 2, 2], 1)[1]),
    ],
    "squeeze": [Case(lambda x: ops.squeeze(x, -2), ((2, 1, 3),), lambda T, x: T.squeeze(x, -2))],
    "stack": [
        Case(lambda a, b: ops.stack([a, b], 1), ((2, 3), (2, 3)), lambda T, a, b: T.stack([a, b], 1)),
        Case(lambda a, b: ops.stack([a, b], -1), ((2,), (2,)), lambda T, a, b: T.stack([a, b], -1)),
        Case(lambda a, b: ops.stack([a, b]), ((), ()), lambda T, a, b: T.stack([a, b])),
    ],
    "swapaxes": [Case(lambda x: ops.swapaxes(x, 0, -1), ((2, 3, 4),), lambda T, x: x.transpose(0, -1))],
    "transpose": [
        Case(lambda x: ops.transpose(x, 1, 2), ((2, 3, 4),), lambda T, x: x.transpose(1, 2)),
        Case(lambda x: x.T, ((2, 3),), lambda T, x: x.T),
    ],
    "tril": [
        Case(lambda x: ops.tril(x), ((3, 4),), lambda T, x: T.tril(x)),
        Case(lambda x: ops.tril(x, -1), ((2, 3, 3),), lambda T, x: T.tril(x, -1)),
    ],
    "unsqueeze": [
        Case(lambda x: ops.unsqueeze(x, 1), ((2, 3),), lambda T, x: T.unsqueeze(x, 1)),
        Case(lambda x: ops.unsqueeze(x, -1), ((),), lambda T, x: T.unsqueeze(x, -1)),
    ],
}

AXES = [
    ((3, 4), None),
    ((3, 4), 0),
    ((3, 4), -1),
    ((2, 3, 4), (0, 2)),
    ((2, 3, 4), (-1, -2)),
    ((5,), None),
    ((1, 1), 0),
]


def reduction(ours, theirs, extra=()):
    """Cases over all axes, with and without keepdims; `theirs(T, x, dims, keepdims)`."""
    made = []
    for shape, axis in [*AXES, *extra]:
        dims = axis if isinstance(axis, tuple) else tuple(range(len(shape))) if axis is None else (axis,)
        for keep in (False, True):
            made.append(
                Case(
                    lambda x, axis=axis, keep=keep: ours(x, axis=axis, keepdims=keep),
                    (shape,),
                    None if theirs is None else lambda T, x, dims=dims, keep=keep: theirs(T, x, dims, keep),
                )
            )
    return made


SCALAR, EMPTY = ((), None), ((0, 3), 0)

REDUCE: Cases = {
    "sum": reduction(ops.sum, lambda T, x, d, k: x.sum(d, keepdim=k), [SCALAR, EMPTY, ((0, 3), None)]),
    "mean": reduction(ops.mean, lambda T, x, d, k: x.mean(d, keepdim=k), [SCALAR, ((0, 3), 1)]),
    "amax": reduction(ops.amax, lambda T, x, d, k: x.amax(d, keepdim=k), [SCALAR, ((0, 3), 1)]),
    "amin": reduction(ops.amin, lambda T, x, d, k: x.amin(d, keepdim=k), [SCALAR]),
    "max": [Case(lambda x: ops.max(x, 1), ((3, 4),), lambda T, x: x.amax(1))],
    "min": [Case(lambda x: ops.min(x, 1, True), ((3, 4),), lambda T, x: x.amin(1, True))],
    "var": [
        *(
            Case(lambda x, a=a: ops.var(x, a), (s,), lambda T, x, a=a: x.var(a))
            for s, a in AXES
            if s != (1, 1)
        ),
        Case(lambda x: ops.var(x, 1, 0, True), ((3, 4),), lambda T, x: x.var(1, correction=0, keepdim=True)),
    ],
    "std": [
        Case(lambda x: ops.std(x, 1), ((3, 4),), lambda T, x: x.std(1)),
        Case(lambda x: ops.std(x, None, 0), ((3, 4),), lambda T, x: x.std(correction=0)),
    ],
    "logsumexp": reduction(ops.logsumexp, lambda T, x, d, k: T.logsumexp(x, d, k), [SCALAR]),
    "prod": [
        Case(lambda x: ops.prod(x), ((3,),), lambda T, x: x.prod(), "positive"),
        Case(lambda x: ops.prod(x, 1, True), ((2, 3),), lambda T, x: x.prod(1, True), "positive"),
        Case(lambda x: ops.prod(x, -1), ((2, 3),), lambda T, x: x.prod(-1)),
    ],
    "cumsum": [
        Case(lambda x: ops.cumsum(x, 0), ((3, 4),), lambda T, x: x.cumsum(0)),
        Case(lambda x: ops.cumsum(x, -1), ((2, 3, 4),), lambda T, x: x.cumsum(-1)),
        Case(lambda x: ops.cumsum(x, 0), ((0,),), lambda T, x: x.cumsum(0)),
    ],
}
