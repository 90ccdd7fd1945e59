"""The CUDA code of the fused kernels for CuPy, as text: what each element, each row, or each term of a sum is.

`ELEMENTWISE` holds (inputs, outputs, code) as `cupy.ElementwiseKernel` takes them; `NUMBERS`, `ROWS` and `SUMS` hold
parameters and body of whole CUDA functions, of which each thread does several numbers, so that it has something to do
while it waits for memory. W is the working precision (float for two-byte floats) and {W} its NumPy name; other
capitals are whatever dtype the arrays have. Importing this file needs no CuPy.
"""

from __future__ import annotations

from typing import NamedTuple

from minipar.kernels.common import GELU_A, GELU_B


class Elementwise(NamedTuple):
    """One pass over arrays that broadcast; `i` is the element's place in the result."""

    inputs: str
    outputs: str
    code: str


class Numbers(NamedTuple):
    """What is computed of the numbers at place `i` of contiguous arrays of one shape, no two of which overlap."""

    parameters: str
    code: str


class Sum(NamedTuple):
    """A sum over the rows of matrices, in the working precision; the term of a `row` lies at `at` in a matrix."""

    parameters: str
    term: str


class Rows(NamedTuple):
    """What a warp, 32 threads side by side, does with one row; `EACH(c, a, b)` shares columns a..b-1 out among them.

    No two of its arrays may overlap: then reads need not wait for the writes before them.
    """

    parameters: str
    code: str


SUM_LANES = 8  # threads that share the rows of a column
NUMBERS_EACH = 4  # numbers of a thread

PREAMBLE = f"""
typedef %(work)s W;
__device__ inline W minus_infinity() {{ return __int_as_float(0xff800000); }}
__device__ inline W not_a_number() {{ return __int_as_float(0x7fc00000); }}
__device__ inline W larger(W a, W b) {{ return (a != a || a > b) ? a : b; }}  // keeps NaN
__device__ inline W or_zero(W top) {{ return top == minus_infinity() ? W(0) : top; }}  // of a row of -inf only
__device__ inline W nonzero(W total) {{ return total == W(0) ? W(1) : total; }}
__device__ inline W cubic(W a) {{ return W({GELU_A!r}) * (a + W({GELU_B!r}) * a * a * a); }}
__device__ inline W slope(W a) {{ return W({GELU_A!r}) * (W(1) + W({3 * GELU_B!r}) * a * a); }}  // of cubic
"""

WINDOWS = (  # the sizes of a convolution, as kernels.gpu_conv gives them
    "int64 samples, int64 channels, int64 height, int64 width, int64 taps_high, int64 taps_wide, int64 step_high,"
    " int64 step_wide, int64 pad_high, int64 pad_wide, int64 apart_high, int64 apart_wide, int64 out_height,"
    " int64 out_width"
)

ELEMENTWISE = {
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

NUMBERS = {
    "cast": Numbers("const T* x, R* y", "y[i] = R(W(x[i]));"),
    "gelu": Numbers(  # (1 + tanh u) / 2 is 1 / (1 + exp(-2u))
        "const T* x, T* y", "W a = W(x[i]); y[i] = T(a / (W(1) + exp(W(-2) * cubic(a))));"
    ),
    "gelu_backward": Numbers(
        "const G* g, const T* x, T* d",
        "W a = W(x[i]), s = W(1) / (W(1) + exp(W(-2) * cubic(a)));"
        "d[i] = T(W(g[i]) * s * (W(1) + W(2) * a * (W(1) - s) * slope(a)));",
    ),
    "gelu_exact": Numbers(
        "const T* x, T* y", "W a = W(x[i]); y[i] = T(W(0.5) * a * (W(1) + erf(a * W(0.7071067811865476))));"
    ),
    "gelu_exact_backward": Numbers(
        "const G* g, const T* x, T* d",
        "W a = W(x[i]);"
        "d[i] = T(W(g[i]) * (W(0.5) * (W(1) + erf(a * W(0.7071067811865476)))"
        " + a * exp(W(-0.5) * a * a) * W(0.3989422804014327)));",
    ),
}  # fmt: skip

SUMS = {
    "sum": Sum("const T* x", "W(x[at])"),
    "by_x": Sum(
        "const G* g, const T* x, const W* mean, const W* rstd", "W(g[at]) * (W(x[at]) - mean[row]) * rstd[row]"
    ),
}

FUNCTION = """
#include <cuda_fp16.h>
{types}
{preamble}
#define EACH(c, a, b) for (long long c = (a) + threadIdx.x; c < (b); c += 32)

__device__ inline W summed(W a) {{  // over the warp; every thread gets it
    for (int apart = 16; apart; apart /= 2) a += __shfl_xor_sync(0xffffffff, a, apart);
    return a;
}}
__device__ inline W largest(W a) {{
    for (int apart = 16; apart; apart /= 2) a = larger(a, __shfl_xor_sync(0xffffffff, a, apart));
    return a;
}}

extern "C" __global__ void minipar_{name}({parameters}, long long rows, long long width) {{
{code}
}}
"""

ROW = """
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
{code}"""

NUMBER = f"""
    #pragma unroll
    for (int part = 0; part < {NUMBERS_EACH}; ++part) {{{{
        const long long i = ((long long)blockIdx.x * {NUMBERS_EACH} + part) * blockDim.x + threadIdx.x;
        if (i < rows * width) {{{{ {{code}} }}}}
    }}}}"""

SUM = f"""
    __shared__ W parts[{SUM_LANES}][32];  // 32 columns side by side, to each {SUM_LANES} threads for its rows
    const long long column = (long long)blockIdx.x * 32 + threadIdx.x;
    W total = 0;
    if (column < width) {{{{
        #pragma unroll 4
        for (long long row = blockIdx.y * {SUM_LANES} + threadIdx.y; row < rows; row += gridDim.y * {SUM_LANES}) {{{{
            const long long at = row * width + column;
            total += {{term}};
        }}}}
    }}}}
    parts[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y || column >= width) return;
    for (int lane = 1; lane < {SUM_LANES}; ++lane) total += parts[lane][threadIdx.x];
    out[blockIdx.y * width + column] = total;"""

ROWS = {  # `queries`, if not 0: row r is of query r % queries, which sees no later key than itself
    "softmax": Rows(
        "const T* x, T* y, long long queries",
        """
    x += row * width, y += row * width;
    const long long seen = queries && row % queries < width ? row % queries + 1 : width;
    W top = minus_infinity(), total = 0;
    EACH(c, 0, seen) top = larger(top, W(x[c]));
    top = or_zero(largest(top));
    EACH(c, 0, seen) total += exp(W(x[c]) - top);
    const W share = W(1) / nonzero(summed(total));
    EACH(c, 0, seen) y[c] = T(exp(W(x[c]) - top) * share);
    EACH(c, seen, width) y[c] = T(W(0));""",
    ),
    "softmax_backward": Rows(
        "const G* g, const T* y, T* d, W scale, long long queries",
        """
    g += row * width, y += row * width, d += row * width;
    const long long seen = queries && row % queries < width ? row % queries + 1 : width;
    W dot = 0;
    EACH(c, 0, seen) dot += W(g[c]) * W(y[c]);
    dot = summed(dot);
    EACH(c, 0, seen) d[c] = T(W(y[c]) * (W(g[c]) - dot) * scale);
    EACH(c, seen, width) d[c] = T(W(0));""",
    ),
    "layer_norm": Rows(
        "const T* x, const S* weight, const S* bias, T* y, W* mean, W* rstd, W eps",
        """
    x += row * width, y += row * width;
    W m = 0, variance = 0;
    EACH(c, 0, width) m += W(x[c]);
    m = summed(m) / width;
    EACH(c, 0, width) { W centred = W(x[c]) - m; variance += centred * centred; }
    const W r = W(1) / sqrt(summed(variance) / width + eps);
    EACH(c, 0, width) y[c] = T((W(x[c]) - m) * r * W(weight[c]) + W(bias[c]));
    if (threadIdx.x == 0) mean[row] = m, rstd[row] = r;""",
    ),
    "layer_norm_backward": Rows(  # by_one = mean(g·w), by_x = mean(g·w·xhat)
        "const G* g, const T* x, const W* mean, const W* rstd, const S* weight, T* d",
        """
    g += row * width, x += row * width, d += row * width;
    const W m = mean[row], r = rstd[row];
    W by_one = 0, by_x = 0;
    EACH(c, 0, width) { W a = W(g[c]) * W(weight[c]); by_one += a; by_x += a * (W(x[c]) - m) * r; }
    by_one = summed(by_one) / width;
    by_x = summed(by_x) / width;
    EACH(c, 0, width) d[c] = T(r * (W(g[c]) * W(weight[c]) - by_one - (W(x[c]) - m) * r * by_x));""",
    ),
    "cross_entropy": Rows(  # saved: top and 1 / total of each row
        "const T* x, const long long* targets, W* losses, W* saved, long long ignored, W smoothing",
        """
    x += row * width;
    const long long target = targets[row];
    W top = minus_infinity(), total = 0, mean = 0;
    EACH(c, 0, width) top = larger(top, W(x[c]));
    top = or_zero(largest(top));
    EACH(c, 0, width) total += exp(W(x[c]) - top);
    total = nonzero(summed(total));
    if (smoothing > 0) {
        EACH(c, 0, width) mean += W(x[c]);
        mean = summed(mean) / width;
    }
    if (threadIdx.x) return;
    saved[row] = top, saved[rows + row] = W(1) / total;
    if (target == ignored) losses[row] = 0;
    else if (target < 0 || target >= width) losses[row] = not_a_number();
    else losses[row] = log(total) - (W(1) - smoothing) * (W(x[target]) - top) - smoothing * (mean - top);""",
    ),
    "cross_entropy_backward": Rows(
        "const G* g, const T* x, const long long* targets, const W* saved, T* d, long long ignored, W smoothing",
        """
    x += row * width, d += row * width;
    const long long target = targets[row];
    const W scale = W(g[row]), top = saved[row], inverse = saved[rows + row];
    if (target == ignored) EACH(c, 0, width) d[c] = T(W(0));
    else EACH(c, 0, width) d[c] = T(scale * (exp(W(x[c]) - top) * inverse - smoothing / W(width)
        - (c == target ? W(1) - smoothing : W(0))));""",
    ),
    "bias_add": Rows(
        "T* y, const B* bias",
        """
    y += row * width;
    EACH(c, 0, width) y[c] = T(W(y[c]) + W(bias[c]));""",
    ),
    "copy_rows": Rows(  # to rows of another width, from rows that begin `apart` elements from one another
        "const T* x, T* y, long long apart, long long known",
        """
    x += row * apart, y += row * width;
    EACH(c, 0, width) y[c] = c < known ? x[c] : T(W(0));""",
    ),
}

FUNCTIONS = {  # parameters and body of each, but for `rows` and `width`, which all of them have
    **{name: (f.parameters, NUMBER.format(code=f.code)) for name, f in NUMBERS.items()},
    **{name: (f.parameters, ROW.format(code=f.code)) for name, f in ROWS.items()},
    **{name: (f.parameters + ", W* out", SUM.format(term=f.term)) for name, f in SUMS.items()},
}
