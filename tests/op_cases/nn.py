"""Cases of the fused primitives of networks: norms, losses, attention, convolution, pooling, dropout."""

import numpy as np

from minipar import ops
from tests.op_cases.case import Case, Cases, beside

TARGETS = np.array([1, 0, 4, -100, 2])
MAY = np.tril(np.ones((4, 6), dtype=bool), 1)
Q, K = (2, 3, 4, 5), (2, 3, 6, 5)


def ce(T, x, **options):
    return T.nn.functional.cross_entropy(x, T.tensor(TARGETS), **options)


def torch_self_attention(T, qkv, heads):
    b, t, width = qkv.shape
    q, k, v = qkv.reshape(b, t, 3, heads, -1).permute(2, 0, 3, 1, 4)
    y = T.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(b, t, width // 3)


def conv(x, w, bias, **options):
    shapes = (x, w, (w[0],)) if bias else (x, w)
    return Case(
        lambda *t: ops.conv2d(*t, **options), shapes, lambda T, *t: T.nn.functional.conv2d(*t, **options)
    )


def batch_norm(x, w, b):
    return ops.batch_norm(x, w, b)[0]


CASES: Cases = {
    "softmax": [
        *(
            Case(lambda x: ops.softmax(x), (s,), lambda T, x: x.softmax(-1))
            for s in ((3, 5), (7,), (2, 3, 1), (0, 4))
        ),
        Case(lambda x: ops.softmax(x, 0), ((3, 5),), lambda T, x: x.softmax(0)),
        Case(lambda x: x.softmax(axis=1), ((2, 3, 4),), lambda T, x: x.softmax(1)),
    ],
    "log_softmax": [
        *(
            Case(lambda x: ops.log_softmax(x), (s,), lambda T, x: x.log_softmax(-1))
            for s in ((3, 5), (7,), (2, 3, 1))
        ),
        Case(lambda x: ops.log_softmax(x, 0), ((3, 5),), lambda T, x: x.log_softmax(0)),
    ],
    "layer_norm": [
        *(
            Case(
                ops.layer_norm,
                (s, s[-1:], s[-1:]),
                lambda T, x, w, b: T.nn.functional.layer_norm(x, w.shape, w, b),
            )
            for s in ((3, 5), (7,), (2, 3, 4), (0, 5), (5, 33))
        ),
        Case(
            lambda x: ops.layer_norm(x, eps=0.1),
            ((3, 5),),
            lambda T, x: T.nn.functional.layer_norm(x, (5,), eps=0.1),
        ),
        Case(
            lambda x, b: ops.layer_norm(x, bias=b),
            ((3, 5), (5,)),
            lambda T, x, b: T.nn.functional.layer_norm(x, (5,)) + b,
        ),
    ],
    "rms_norm": [
        *(
            Case(ops.rms_norm, (s, s[-1:]), lambda T, x, w: T.nn.functional.rms_norm(x, w.shape, w, 1e-6))
            for s in ((3, 5), (7,), (2, 3, 4), (0, 5))
        ),
        Case(lambda x: ops.rms_norm(x), ((3, 5),), lambda T, x: T.nn.functional.rms_norm(x, (5,), eps=1e-6)),
    ],
    "group_norm": [
        *(
            Case(
                lambda x, w, b, g=g: ops.group_norm(x, g, w, b),
                (s, s[1:2], s[1:2]),
                lambda T, x, w, b, g=g: T.nn.functional.group_norm(x, g, w, b),
            )
            for s, g in (((2, 4, 3, 5), 2), ((1, 6, 7), 3), ((3, 4), 1), ((2, 4, 3, 3), 1))
        ),
        Case(lambda x: ops.group_norm(x, 2), ((2, 4, 3),), lambda T, x: T.nn.functional.group_norm(x, 2)),
        Case(lambda x: ops.group_norm(x, 2), ((0, 4, 3),)),
    ],
    "batch_norm": [
        Case(
            batch_norm,
            (s, s[1:2], s[1:2]),
            lambda T, x, w, b: T.nn.functional.batch_norm(x, None, None, w, b, training=True),
        )
        for s in ((4, 3, 2, 5), (5, 3), (2, 1, 7))
    ]
    + [
        Case(
            lambda x: ops.batch_norm(x, eps=0.1)[0],
            ((4, 3),),
            lambda T, x: T.nn.functional.batch_norm(x, None, None, training=True, eps=0.1),
        )
    ],
    "normalise_channels": [
        Case(
            lambda x, w, b: ops.normalise_channels(
                x, beside(x, np.arange(3, dtype=x.dtype)), beside(x, np.full(3, 2, x.dtype)), w, b
            ),
            ((4, 3, 2, 2), (3,), (3,)),
            lambda T, x, w, b: T.nn.functional.batch_norm(
                x, T.arange(3, dtype=x.dtype), T.full((3,), 2.0, dtype=x.dtype), w, b
            ),
        ),
        Case(
            lambda x: ops.normalise_channels(
                x, beside(x, np.zeros(3, x.dtype)), beside(x, np.ones(3, x.dtype))
            ),
            ((2, 3),),
        ),
    ],
    "cross_entropy": [
        Case(lambda x: ops.cross_entropy(x, beside(x, TARGETS)), ((5, 6),), ce),
        Case(
            lambda x: ops.cross_entropy(x, beside(x, TARGETS), reduction="sum"),
            ((5, 6),),
            lambda T, x: ce(T, x, reduction="sum"),
        ),
        Case(
            lambda x: ops.cross_entropy(x, beside(x, TARGETS), reduction="none"),
            ((5, 6),),
            lambda T, x: ce(T, x, reduction="none"),
        ),
        Case(
            lambda x: ops.cross_entropy(x, beside(x, TARGETS % 5), ignore_index=2),
            ((5, 6),),
            lambda T, x: T.nn.functional.cross_entropy(x, T.tensor(TARGETS % 5), ignore_index=2),
        ),
        Case(
            lambda x: ops.cross_entropy(x, beside(x, TARGETS), label_smoothing=0.2),
            ((5, 6),),
            lambda T, x: ce(T, x, label_smoothing=0.2),
        ),
        Case(lambda x: ops.cross_entropy(x, beside(x, (TARGETS % 5).reshape(1, 5))), ((1, 5, 6),)),
        Case(lambda x: ops.cross_entropy(x, beside(x, TARGETS[:0]), reduction="sum"), ((0, 6),)),
    ],
    "mse_loss": [
        Case(
            lambda a, b, r=r: ops.mse_loss(a, b, r),
            ((3, 4), (3, 4)),
            lambda T, a, b, r=r: T.nn.functional.mse_loss(a, b, reduction=r),
        )
        for r in ("mean", "sum", "none")
    ],
    "scaled_dot_product_attention": [
        Case(
            ops.scaled_dot_product_attention,
            (Q, K, K),
            lambda T, *t: T.nn.functional.scaled_dot_product_attention(*t),
        ),
        Case(
            lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, causal=True),
            (Q, Q, Q),
            lambda T, *t: T.nn.functional.scaled_dot_product_attention(*t, is_causal=True),
        ),
        Case(
            lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, beside(q, MAY)),
            (Q, K, K),
            lambda T, *t: T.nn.functional.scaled_dot_product_attention(*t, T.tensor(MAY)),
        ),
        Case(
            lambda q, k, v: ops.scaled_dot_product_attention(
                q, k, v, beside(q, np.where(MAY, 0.5, -1.0).astype(q.dtype)), scale=0.3
            ),
            (Q, K, K),
            lambda T, q, k, v: T.nn.functional.scaled_dot_product_attention(
                q, k, v, T.where(T.tensor(MAY), 0.5, -1.0).to(q.dtype), scale=0.3
            ),
        ),
        Case(ops.scaled_dot_product_attention, ((4, 5), (6, 5), (6, 5))),
    ],
    "self_attention": [
        Case(
            lambda x, d=d: ops.self_attention(x, d),
            (s,),
            lambda T, x, d=d: torch_self_attention(T, x, x.shape[-1] // 3 // d),
        )
        for s, d in (((2, 5, 24), 4), ((1, 1, 9), 3), ((3, 4, 6), 1))
    ]
    + [Case(lambda x: ops.self_attention(x, 2, causal=False), ((2, 3, 12),))],
    "conv2d": [
        conv((2, 3, 5, 6), (4, 3, 3, 3), True),
        conv((2, 3, 5, 6), (4, 3, 3, 2), False, stride=2, padding=1),
        conv((1, 4, 7, 7), (6, 2, 3, 3), True, padding=(2, 1), dilation=2, groups=2),
        conv((2, 4, 5, 5), (4, 1, 3, 3), True, groups=4, padding=1),
        conv((2, 3, 4, 4), (5, 3, 1, 1), True, stride=(2, 3)),
        conv((2, 1, 3, 3), (1, 1, 3, 3), False),
    ],
    "max_pool2d": [
        Case(
            lambda x, o=o: ops.max_pool2d(x, *o),
            ((2, 3, 6, 7),),
            lambda T, x, o=o: T.nn.functional.max_pool2d(x, *o),
        )
        for o in ((2,), (3, 2, 1), ((2, 3), (1, 2)), (3, 1))
    ],
    "avg_pool2d": [
        Case(
            lambda x, o=o: ops.avg_pool2d(x, *o),
            ((2, 3, 6, 7),),
            lambda T, x, o=o: T.nn.functional.avg_pool2d(x, *o),
        )
        for o in ((2,), (3, 2, 1), ((2, 3), (1, 2)))
    ],
    "dropout": [
        Case(lambda x, p=p: ops.dropout(x, p, 12345, 7), (s,))
        for p in (0.0, 0.5)
        for s in ((4, 5), (), (0, 3))
    ],
}
