"""Arguments for every fused GPU kernel, on the host, under names like "kernel, what about it".

A case is a function of a dtype that returns (arguments, options, tolerance).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minipar.kernels import plain
from tests.kernel_checks import TOLERANCE, make

Case = Callable[[str], tuple[list[Any], dict[str, Any], float]]
CASES: dict[str, Case] = {}
ROWS, WIDTH = 37, 130


def case(name: str) -> Callable[[Callable[[Any], tuple[list[Any], dict[str, Any]]]], None]:
    def add(build: Callable[[Any], tuple[list[Any], dict[str, Any]]]) -> None:
        def full(dtype: str) -> tuple[list[Any], dict[str, Any], float]:
            kind = np.dtype(dtype).type
            arguments, options = build(kind)
            return arguments, options, 5 * TOLERANCE[kind]

        CASES[name] = full

    return add


def matrix(kind: Any, seed: int = 0, scale: float = 1.0) -> Any:
    return make(ROWS, WIDTH, dtype=kind, seed=seed, scale=scale)


def norm_statistics(x: Any) -> tuple[Any, Any]:
    wide = x.astype(np.float32 if x.dtype.itemsize == 2 else x.dtype)
    mean = wide.mean(-1, keepdims=True)
    return mean, 1 / np.sqrt(wide.var(-1, keepdims=True) + wide.dtype.type(1e-5))


def gelu_values(kind: Any, form: str) -> tuple[Any, Any]:
    x = matrix(kind, scale=3)
    return x, plain.gelu(x, form)


for _form in ("tanh", "none"):
    case(f"gelu, {_form}")(lambda kind, form=_form: ([matrix(kind, scale=3)], {"approximate": form}))
    case(f"gelu_backward, {_form}")(
        lambda kind, form=_form: ([matrix(kind, 1), *gelu_values(kind, form)], {"approximate": form})
    )
for _dtype in ("float16", "float32", "float64"):
    case(f"cast, to {_dtype}")(lambda kind, to=_dtype: ([matrix(kind), to], {}))
    case(f"cast, a transposed matrix to {_dtype}")(lambda kind, to=_dtype: ([matrix(kind).T, to], {}))
case("layer_norm")(
    lambda kind: ([matrix(kind) + kind(2), make(WIDTH, dtype=kind), make(WIDTH, dtype=kind, seed=1), 1e-5], {})
)
case("layer_norm, without bias")(lambda kind: ([matrix(kind), make(WIDTH, dtype=kind), None, 1e-5], {}))
case("layer_norm_backward")(
    lambda kind: (
        [matrix(kind, 1), matrix(kind), *norm_statistics(matrix(kind)), make(WIDTH, dtype=kind)],
        {},
    )
)
case("softmax")(lambda kind: ([matrix(kind, scale=5), -1], {}))
case("softmax, first axis")(lambda kind: ([matrix(kind, scale=5), 0], {}))


@case("softmax, a row of -inf")
def _(kind: Any) -> Any:
    x = matrix(kind)
    x[3] = -np.inf
    return [x, -1], {}


case("softmax_backward")(lambda kind: ([matrix(kind, 1), np.abs(matrix(kind)) / kind(WIDTH), -1], {}))


def targets() -> Any:
    chosen = np.random.default_rng(0).integers(0, WIDTH, ROWS)
    chosen[[2, 5]] = -100
    return chosen


for _smoothing in (0.0, 0.1):
    case(f"cross_entropy, smoothing {_smoothing}")(
        lambda kind, s=_smoothing: ([matrix(kind, scale=5), targets()], {"label_smoothing": s})
    )

    @case(f"cross_entropy_backward, smoothing {_smoothing}")
    def _(kind: Any, s: float = _smoothing) -> Any:
        from minipar.kernels import plain

        x = matrix(kind, scale=5)
        saved = plain.cross_entropy(x, targets())[1]
        return [make(ROWS, dtype=saved.dtype.type, seed=1), x, targets(), saved], {"label_smoothing": s}


def heads(kind: Any, seed: int) -> Any:
    return make(2, 3, 17, 8, dtype=kind, seed=seed)


case("attention")(lambda kind: ([heads(kind, s) for s in range(3)], {}))
case("attention, causal")(lambda kind: ([heads(kind, s) for s in range(3)], {"causal": True}))
case("attention, mask")(
    lambda kind: ([heads(kind, s) for s in range(3)], {"mask": np.tri(17, dtype=bool), "scale": 0.25})
)


@case("attention_backward, causal")
def _(kind: Any) -> Any:
    from minipar.kernels import plain

    q, k, v = (heads(kind, s) for s in range(3))
    probs = plain.attention(q, k, v, causal=True)[1].astype(kind)
    return [heads(kind, 3), q, k, v, probs], {"causal": True}


case("split_heads")(lambda kind: ([make(2, 5, 3 * 4 * 8, dtype=kind), 8], {}))
case("linear")(lambda kind: ([make(2, 5, 12, dtype=kind), make(7, 12, dtype=kind), make(7, dtype=kind)], {}))
case("bias_add_")(lambda kind: ([matrix(kind), make(WIDTH, dtype=kind, seed=1)], {}))
case("linear_backward_input")(lambda kind: ([make(2, 5, 7, dtype=kind), make(7, 12, dtype=kind)], {}))
case("linear_backward_weight")(lambda kind: ([make(2, 5, 7, dtype=kind), make(2, 5, 12, dtype=kind)], {}))
case("linear_backward_bias")(lambda kind: ([make(6, 32, 7, dtype=kind)], {}))
case("linear_backward_bias, an odd number of rows")(lambda kind: ([make(ROWS, 7, dtype=kind)], {}))
case("embedding")(lambda kind: ([make(11, 6, dtype=kind), np.array([[0, 10], [3, 3]])], {}))
for _decoupled in (True, False):
    case(f"adam_step_, decoupled {_decoupled}")(
        lambda kind, decoupled=_decoupled: (
            [matrix(kind), matrix(kind, 1), matrix(kind, 2) * kind(0.1), np.abs(matrix(kind, 3)),
             1e-2, 0.9, 0.999, 1e-8, 0.1, 3, decoupled],
            {},
        )
    )  # fmt: skip

Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups
CONVOLUTIONS: dict[str, Window] = {
    "same": ((1, 1), (1, 1), (1, 1), 1),
    "uneven": ((2, 1), (0, 2), (1, 2), 1),
    "groups": ((1, 2), (1, 0), (2, 1), 2),
}


def images(kind: Any) -> Any:
    return make(3, 4, 9, 8, dtype=kind)


def filters(kind: Any, groups: int) -> Any:
    return make(6, 4 // groups, 3, 2, dtype=kind, seed=1)


def gradient(kind: Any, window: Window) -> Any:
    return make(*plain.conv2d(images(kind), filters(kind, window[-1]), None, *window).shape, dtype=kind, seed=2)


for _name, _window in CONVOLUTIONS.items():
    case(f"conv2d, {_name}")(
        lambda kind, w=_window: ([images(kind), filters(kind, w[-1]), make(6, dtype=kind, seed=3), *w], {})
    )
    case(f"conv2d_backward_input, {_name}")(
        lambda kind, w=_window: ([gradient(kind, w), filters(kind, w[-1]), images(kind).shape, *w], {})
    )
    case(f"conv2d_backward_weight, {_name}")(
        lambda kind, w=_window: ([gradient(kind, w), images(kind), (3, 2), *w], {})
    )
case("conv2d, without bias")(
    lambda kind: ([images(kind), filters(kind, 1), None, (1, 1), (0, 0), (1, 1), 1], {})
)
