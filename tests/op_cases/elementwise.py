"""Cases of the elementwise primitives."""

import numpy as np

from minipar import ops
from tests.op_cases.case import Case, Cases, beside

UNARY = [(3, 5), (7,), (), (1,), (2, 0, 3), (1, 3, 1)]
BINARY = [
    ((3, 4), (3, 4)),
    ((3, 4), (4,)),
    ((3, 1), (1, 4)),
    ((), (3,)),
    ((2, 3), ()),
    ((0, 3), (3,)),
    ((0, 3), (1, 3)),
    ((2, 1, 3), (4, 1)),
    ((1,), (5,)),
    ((1, 1), (1,)),
]


def unary(fn, torch, draw="normal"):
    return [Case(fn, (shape,), torch, draw) for shape in UNARY]


def binary(fn, torch, draw="normal"):
    return [Case(fn, shapes, torch, draw) for shapes in BINARY]


MASK = np.arange(12).reshape(3, 4) % 3 == 0

CASES: Cases = {
    "abs": unary(ops.abs, lambda T, x: T.abs(x), "apart"),
    "add": [
        *binary(ops.add, lambda T, a, b: a + b),
        Case(lambda a: a + 1.5, ((2, 3),), lambda T, a: a + 1.5),
    ],
    "astype": [Case(lambda x: ops.astype(x, x.dtype), ((2, 3),))],
    "clamp": [
        Case(lambda x: ops.clamp(x, -0.5, 0.7), ((4, 5),), lambda T, x: T.clamp(x, -0.5, 0.7)),
        Case(lambda x: ops.clamp(x, low=0.1), ((4, 5),), lambda T, x: T.clamp(x, min=0.1)),
        Case(lambda x: ops.clamp(x, high=0.1), ((),), lambda T, x: T.clamp(x, max=0.1)),
    ],
    "cos": unary(ops.cos, lambda T, x: T.cos(x)),
    "div": [
        *binary(ops.div, lambda T, a, b: a / b, "positive"),
        Case(lambda a: 2 / a, ((2, 3),), lambda T, a: 2 / a, "positive"),
        Case(lambda a: a / 3, ((2, 3),), lambda T, a: a / 3),
    ],
    "erf": unary(ops.erf, lambda T, x: T.erf(x)),
    "exp": unary(ops.exp, lambda T, x: T.exp(x)),
    "gelu": [
        *unary(ops.gelu, lambda T, x: T.nn.functional.gelu(x, approximate="tanh")),
        *unary(lambda x: ops.gelu(x, "none"), lambda T, x: T.nn.functional.gelu(x)),
    ],
    "log": unary(ops.log, lambda T, x: T.log(x), "positive"),
    "maximum": [
        *binary(ops.maximum, lambda T, a, b: T.maximum(a, b)),
        Case(lambda a: ops.maximum(a, 0.2), ((5,),)),
    ],
    "minimum": [
        *binary(ops.minimum, lambda T, a, b: T.minimum(a, b)),
        Case(lambda a: ops.minimum(0.2, a), ((5,),)),
    ],
    "mul": [
        *binary(ops.mul, lambda T, a, b: a * b),
        Case(lambda a: 3 * a, ((2, 3),), lambda T, a: 3 * a),
        Case(lambda a: a * a, ((2, 3),), lambda T, a: a * a),
    ],
    "neg": unary(ops.neg, lambda T, x: -x),
    "pow": [
        *binary(ops.pow, lambda T, a, b: a**b, "positive"),
        *(
            Case(lambda x, n=n: x**n, ((3, 4),), lambda T, x, n=n: x**n, "positive")
            for n in (2, 3, 0, 1, -1, 0.5)
        ),
        Case(lambda x: x**3, ((3, 4),), lambda T, x: x**3),
        Case(lambda x: 2**x, ((3, 4),), lambda T, x: 2**x),
    ],
    "relu": unary(ops.relu, lambda T, x: T.relu(x), "apart"),
    "sigmoid": unary(ops.sigmoid, lambda T, x: T.sigmoid(x)),
    "silu": unary(ops.silu, lambda T, x: T.nn.functional.silu(x)),
    "sin": unary(ops.sin, lambda T, x: T.sin(x)),
    "sqrt": unary(ops.sqrt, lambda T, x: T.sqrt(x), "positive"),
    "square": unary(ops.square, lambda T, x: T.square(x)),
    "sub": [
        *binary(ops.sub, lambda T, a, b: a - b),
        Case(lambda a: 1.5 - a, ((2, 3),), lambda T, a: 1.5 - a),
    ],
    "tanh": unary(ops.tanh, lambda T, x: T.tanh(x)),
    "where": [
        Case(
            lambda a, b: ops.where(beside(a, MASK), a, b),
            shapes,
            lambda T, a, b: T.where(T.tensor(MASK), a, b),
        )
        for shapes in (((3, 4), (3, 4)), ((4,), (3, 1)), ((), (3, 4)), ((1, 4), ()))
    ]
    + [Case(lambda a: ops.where(beside(a, MASK), a, -1.0), ((3, 4),))],
}
