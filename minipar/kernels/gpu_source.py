"""The CUDA code of the fused kernels for CuPy, as text: what each element, or each term of a sum, is.

`ELEMENTWISE` and `SUMS` hold (inputs, outputs or terms, code) as `cupy.ElementwiseKernel` and
`cupy.ReductionKernel` take them. In both, W is the working precision (float for two-byte floats) and {W} its
NumPy name; other capitals are whatever dtype the arrays have. Importing this file needs no CuPy.
"""

from __future__ import annotations

from typing import NamedTuple

from minipar.kernels.common import GELU_A, GELU_B


class Elementwise(NamedTuple):
    """One pass over arrays that broadcast; `i` is the element's place in the result."""

    inputs: str
    outputs: str
    code: str


class Sum(NamedTuple):
    """The sum (or, with `reduce`, the maximum) of a term along axes; the result has the working precision."""

    inputs: str
    term: str
    reduce: str = "a + b"
    identity: str = "0"


PREAMBLE = f"""
typedef %(work)s W;
__device__ inline W minus_infinity() {{ return __int_as_float(0xff800000); }}
__device__ inline W not_a_number() {{ return __int_as_float(0x7fc00000); }}
__device__ inline W larger(W a, W b) {{ return (a != a || a > b) ? a : b; }}  // keeps NaN
__device__ inline W or_zero(W top) {{ return top == minus_infinity() ? W(0) : top; }}  // of a row of -inf only
__device__ inline W nonzero(W total) {{ return total == W(0) ? W(1) : total; }}
__device__ inline W cubic(W a) {{ return W({GELU_A!r}) * (a + W({GELU_B!r}) * a * a * a); }}
"""

WINDOWS = (  # the sizes of a convolution, as kernels.gpu_conv gives them
    "int64 samples, int64 channels, int64 height, int64 width, int64 taps_high, int64 taps_wide, int64 step_high,"
    " int64 step_wide, int64 pad_high, int64 pad_wide, int64 apart_high, int64 apart_wide, int64 out_height,"
    " int64 out_width"
)

ELEMENTWISE = {
    "gelu": Elementwise(
        "T x", "T y", "W a = W(x); y = T(W(0.5) * a * (W(1) + tanh(cubic(a))));"
    ),
    "gelu_exact": Elementwise(
        "T x", "T y", "W a = W(x); y = T(W(0.5) * a * (W(1) + erf(a * W(0.7071067811865476))));"
    ),
    "gelu_backward": Elementwise(
        "G g, T x", "T d",
        f"W a = W(x); W t = tanh(cubic(a));"
        f"d = T(W(g) * (W(0.5) * (W(1) + t) + W(0.5) * a * (W(1) - t * t)"
        f" * W({GELU_A!r}) * (W(1) + W({3 * GELU_B!r}) * a * a)));",
    ),
    "gelu_exact_backward": Elementwise(
        "G g, T x", "T d",
        "W a = W(x);"
        "d = T(W(g) * (W(0.5) * (W(1) + erf(a * W(0.7071067811865476)))"
        " + a * exp(W(-0.5) * a * a) * W(0.3989422804014327)));",
    ),
    "inverse_root": Elementwise(  # 1 / sqrt(mean square + eps)
        "{W} squares, {W} count, {W} eps", "{W} r", "r = W(1) / sqrt(squares / count + eps);"
    ),
    "normalise": Elementwise(
        "T x, {W} mean, {W} rstd", "T y", "y = T((W(x) - mean) * rstd);"
    ),
    "normalise_scaled": Elementwise(
        "T x, {W} mean, {W} rstd, S weight, S bias", "T y",
        "y = T((W(x) - mean) * rstd * W(weight) + W(bias));",
    ),
    "layer_norm_backward": Elementwise(  # by_one = mean(g·w), by_x = mean(g·w·xhat)
        "G g, T x, {W} mean, {W} rstd, S weight, {W} by_one, {W} by_x", "T d",
        "d = T(rstd * (W(g) * W(weight) - by_one - (W(x) - mean) * rstd * by_x));",
    ),
    "softmax": Elementwise(
        "T x, int32 query, int32 key, {W} top, {W} total", "T y",
        "y = key <= query ? T(exp(W(x) - or_zero(top)) / nonzero(total)) : T(W(0));",
    ),
    "softmax_backward": Elementwise(
        "G g, T y, {W} dot, {W} scale", "T d", "d = T(W(y) * (W(g) - dot) * scale);"
    ),
    "cross_entropy": Elementwise(
        "raw T logits, I target, {W} top, {W} total, {W} mean, int64 width, int64 ignored, {W} smoothing",
        "T loss",
        "if (target == ignored) loss = T(W(0));"
        "else if (target < 0 || target >= width) loss = T(not_a_number());"
        "else loss = T(log(nonzero(total)) - (W(1) - smoothing) * (W(logits[i * width + target]) - or_zero(top))"
        " - smoothing * (mean - or_zero(top)));",
    ),
    "cross_entropy_backward": Elementwise(
        "T logits, {W} top, {W} inverse, G g, I target, I column, int64 width, int64 ignored, {W} smoothing",
        "T d",
        "d = target == ignored ? T(W(0)) : T(W(g) * (exp(W(logits) - top) * inverse - smoothing / W(width)"
        " - (column == target ? W(1) - smoothing : W(0))));",
    ),
    "embedding": Elementwise(
        "raw T weight, I id, int64 rows, int64 width", "T y",
        "y = id < 0 || id >= rows ? T(not_a_number()) : weight[id * width + i % width];",
    ),
    "add": Elementwise("T a, B b", "R y", "y = R(W(a) + W(b));"),
    "unfold": Elementwise(  # x (N, C, H, W) to windows (C, kh, kw, N, OH, OW), of which `i` is one number's place
        f"raw T x, {WINDOWS}", "T y",
        "long long at = i;"
        "long long column = at % out_width; at /= out_width; long long row = at % out_height; at /= out_height;"
        "long long sample = at % samples; at /= samples;"
        "long long tap_column = at % taps_wide; at /= taps_wide; long long tap_row = at % taps_high; at /= taps_high;"
        "column = column * step_wide - pad_wide + tap_column * apart_wide;"
        "row = row * step_high - pad_high + tap_row * apart_high;"
        "y = row < 0 || row >= height || column < 0 || column >= width ? T(0)"
        " : x[((sample * channels + at) * height + row) * width + column];",
    ),
    "fold": Elementwise(  # the transpose of unfold: each pixel gathers from the windows that it lies in
        f"raw T x, {WINDOWS}", "T y",
        "long long at = i;"
        "long long column = at % width; at /= width; long long row = at % height; at /= height;"
        "long long channel = at % channels; long long sample = at / channels;"
        "W total = W(0);"
        "for (long long down = 0; down < taps_high; ++down) {"
        " long long from = row + pad_high - down * apart_high;"
        " if (from < 0 || from % step_high || from / step_high >= out_height) continue;"
        " for (long long across = 0; across < taps_wide; ++across) {"
        "  long long left = column + pad_wide - across * apart_wide;"
        "  if (left < 0 || left % step_wide || left / step_wide >= out_width) continue;"
        "  long long window = (channel * taps_high + down) * taps_wide + across;"
        "  total += W(x[((window * samples + sample) * out_height + from / step_high) * out_width"
        " + left / step_wide]);"
        " } }"
        "y = T(total);",
    ),
    "adam": Elementwise(
        "T w, G grad, T first, T second, {W} one_less_beta1, {W} beta2, {W} eps, {W} decay,"
        " {W} shrink, {W} root_correction, {W} step_size",
        "T new_w, T new_first, T new_second",
        "W p = W(w) * shrink; W g = W(grad) + decay * W(w);"
        "W m = W(first) + one_less_beta1 * (g - W(first));"
        "W v = W(second) * beta2 + (W(1) - beta2) * g * g;"
        "new_first = T(m); new_second = T(v);"
        "new_w = T(p - step_size * m / (sqrt(v) / root_correction + eps));",
    ),
}  # fmt: skip

SUMS = {
    "sum": Sum("T x", "W(x)"),
    "squares": Sum("T x, {W} mean", "(W(x) - mean) * (W(x) - mean)"),
    "product": Sum("G g, T y", "W(g) * W(y)"),
    "weighted": Sum("G g, S weight", "W(g) * W(weight)"),
    "weighted_by_x": Sum(
        "G g, T x, {W} mean, {W} rstd, S weight", "W(g) * W(weight) * (W(x) - mean) * rstd"
    ),
    "by_x": Sum("G g, T x, {W} mean, {W} rstd", "W(g) * (W(x) - mean) * rstd"),
    "top": Sum(
        "T x, int32 query, int32 key", "key <= query ? W(x) : minus_infinity()", "larger(a, b)",
        "minus_infinity()",
    ),
    "exponentials": Sum(
        "T x, int32 query, int32 key, {W} top", "key <= query ? exp(W(x) - or_zero(top)) : W(0)"
    ),
}  # fmt: skip
