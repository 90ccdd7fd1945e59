"""Cases of the matrix products."""

import numpy as np

from minipar import ops
from minipar.tensor import Tensor
from tests.op_cases.case import Case, Cases, beside

PRODUCTS = [
    ((2, 3), (3, 4)),
    ((3,), (3, 4)),
    ((2, 3), (3,)),
    ((3,), (3,)),
    ((5, 2, 3), (3, 4)),
    ((2, 3), (5, 3, 4)),
    ((5, 1, 2, 3), (4, 3, 2)),
    ((3,), (5, 3, 4)),
    ((5, 2, 3), (3,)),
    ((0, 3), (3, 2)),
    ((2, 0), (0, 3)),
    ((1, 1), (1, 1)),
]
SUMS = [
    ("ij,jk->ik", ((2, 3), (3, 4))),
    ("bij,bkj->bik", ((2, 3, 4), (2, 5, 4))),
    ("ij->ji", ((2, 3),)),
    ("ij->i", ((2, 3),)),
    ("i,j->ij", ((2,), (3,))),
    ("ij,ij->", ((2, 3), (2, 3))),
    ("abc,cd,de->abe", ((2, 3, 2), (2, 3), (3, 2))),
    ("ij,k->k", ((2, 3), (4,))),
]
IDS = np.array([[0, 3, 3], [1, 0, 3]])


def _linear(T, *t):
    return T.nn.functional.linear(*t)


CASES: Cases = {
    "matmul": [Case(ops.matmul, shapes, lambda T, a, b: a @ b) for shapes in PRODUCTS],
    "linear": [
        *(
            Case(ops.linear, (x, (4, 3), (4,)), _linear)
            for x in ((5, 3), (3,), (2, 5, 3), (0, 3), (1, 3), (2, 1, 2, 3))
        ),
        Case(lambda x, w: ops.linear(x, w), ((2, 5, 3), (4, 3)), _linear),
        Case(lambda x, w, b: ops.linear(x, weight=w, bias=b), ((5, 3), (4, 3), (4,)), _linear),
        Case(lambda x, w: ops.linear(x.T, w), ((3, 5), (4, 3)), lambda T, x, w: _linear(T, x.T, w)),
    ],
    "rounded": [Case(lambda x: ops.rounded(x, Tensor(x.data[:1])), ((5, 3),), lambda T, x: x * 1)],
    "embedding": [
        Case(
            lambda w: ops.embedding(w, beside(w, IDS)),
            ((5, 3),),
            lambda T, w: T.nn.functional.embedding(T.tensor(IDS), w),
        ),
        Case(lambda w: ops.embedding(w, beside(w, IDS[:0])), ((5, 3),)),
        Case(lambda w: ops.embedding(w, beside(w, np.array(3))), ((5, 3),), lambda T, w: w[3]),
    ],
    "einsum": [
        Case(lambda *t, s=s: ops.einsum(s, *t), shapes, lambda T, *t, s=s: T.einsum(s, *t))
        for s, shapes in SUMS
    ],
}
