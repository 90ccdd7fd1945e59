"""What one operation costs, counted: matrix products, elements moved through memory, elements kept.

    linear(rows=4096, inputs=1024, outputs=4096).flops("forward")     # 2 · rows · inputs · outputs

Each function makes the `Op` of one operation on one rank, from the sizes that this rank computes. Three
passes are told apart, as pipeline schedules need them: "forward", "input" (the gradient of the input) and
"weight" (the gradient of the weights). Elements moved are those that a kernel has to read and write once if
nothing stays in a cache; a matrix product counts its own three matrices (see `op_time.matmul_seconds`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Matmul(NamedTuple):
    """`times` products (m, k) @ (k, n)."""

    m: float
    k: float
    n: float
    times: float = 1

    @property
    def flops(self) -> float:
        """Multiplications and additions: 2 m k n each."""
        return 2.0 * self.m * self.k * self.n * self.times


@dataclass(frozen=True)
class Op:
    """One operation on one rank.

    Attributes:
        kind: names the operation; a calibrated machine has a table of times for it.
        size: the sizes that such a table is measured over.
        forward, input, weight: the matrix products of each pass.
        moved: elements read and written in each pass, apart from those of the matrix products.
        saved: elements kept for backward, those apart that the operation before keeps anyway.
        high: those of them that mixed precision leaves in float32.
        cast: elements of an input that comes in float32, of which mixed precision keeps a copy for the product.
        parameters: elements of each parameter tensor, as this rank holds them.
    """

    kind: str
    size: tuple[int, ...]
    forward: tuple[Matmul, ...] = ()
    input: tuple[Matmul, ...] = ()
    weight: tuple[Matmul, ...] = ()
    moved: tuple[float, float, float] = (0.0, 0.0, 0.0)
    saved: float = 0.0
    parameters: tuple[int, ...] = ()
    high: float = 0.0
    cast: float = 0.0

    def matmuls(self, work: str) -> tuple[Matmul, ...]:
        """Return the products of a pass."""
        return {"forward": self.forward, "input": self.input, "weight": self.weight}[work]

    def flops(self, work: str) -> float:
        """Return the floating-point operations of a pass: those of its matrix products."""
        return sum(product.flops for product in self.matmuls(work))


def linear(
    rows: int, inputs: int, outputs: int, *, bias: bool = True, keeps_input: bool = True, first: bool = False
) -> Op:
    """x (rows, inputs) Wᵀ + b: 2·rows·inputs·outputs operations in each of the three passes.

    Args:
        keeps_input: the input is kept for the weight's gradient, and nobody else keeps it.
        first: the input is data, which needs no gradient.
    """
    y = rows * outputs
    return Op(
        "linear", (rows, inputs, outputs),
        forward=(Matmul(rows, inputs, outputs),),
        input=() if first else (Matmul(rows, outputs, inputs),),
        weight=(Matmul(outputs, rows, inputs),),
        # A bias is added where the product is written (an epilogue); its gradient reads the output's once.
        moved=(0.0, 0.0, float(y) if bias else 0.0),
        saved=float(rows * inputs) if keeps_input else 0.0,
        parameters=(inputs * outputs, outputs) if bias else (inputs * outputs,),
    )  # fmt: skip


def attention(samples: int, heads: int, tokens: int, head_dim: int, *, dropout: bool = False) -> Op:
    """softmax(q kᵀ) v of every head: 4·T²·D operations a head forward, twice that backward.

    Narayanan et al. 2021, appendix: 4·B·s²·h forward for all heads, the causal half not being left out. The
    scores (heads, T, T) are written, normalised in place, and kept; this is no fused "flash" kernel. Backward
    is counted whole as the gradient of the input: there are no weights. Its saved elements are q, k, v
    (3·T·D a head) and the probabilities (T²).
    """
    h, t, d = samples * heads, tokens, head_dim
    scores = float(h * t * t)
    masks = 2.5 * scores if dropout else 0.0  # read, write, and a byte of mask: half an element of 2 bytes
    return Op(
        "attention", (h, t, d),
        forward=(Matmul(t, d, t, h), Matmul(t, t, d, h)),
        input=(Matmul(t, d, t, h), Matmul(t, t, d, 3 * h)),
        moved=(2 * scores + masks, 3 * scores + masks, 0.0),
        saved=3.0 * h * t * d + scores + (1.5 * scores if dropout else 0.0), high=scores,
    )  # fmt: skip


def layer_norm(rows: int, width: int) -> Op:
    """(rows, width) normalised: read and write forward; x, g, dx and the gradient's sum over paths backward."""
    n = rows * width
    return Op(
        "layer_norm", (rows, width), moved=(2.0 * n, 3.0 * n, float(n)), saved=n + 2.0 * rows,
        parameters=(width, width), high=n + 2.0 * rows,
    )  # fmt: skip


def gelu(elements: int) -> Op:
    """An elementwise function that keeps its input: 2 moves forward, 3 backward."""
    return Op("gelu", (elements,), moved=(2.0 * elements, 3.0 * elements, 0.0), saved=float(elements))


def relu(elements: int, high: bool = False) -> Op:
    """max(x, 0), which keeps its output: 2 moves forward, 3 backward. High behind a norm, low behind a product."""
    n = float(elements)
    return Op("relu", (elements,), moved=(2 * n, 3 * n, 0.0), saved=n, high=n if high else 0.0)


def add(elements: int) -> Op:
    """A residual sum: two reads and a write forward; backward adds the gradients of the two paths."""
    return Op("add", (elements,), moved=(3.0 * elements, 3.0 * elements, 0.0))


def dropout_add(elements: int) -> Op:
    """Dropout and the residual sum in one kernel (Narayanan et al. 2021, section 4.2).

    Forward reads both, writes the sum and a mask of a byte (half an element of two bytes); backward reads
    gradient and mask, writes one gradient, and adds those of the two paths.
    """
    n = float(elements)
    return Op("dropout_add", (elements,), moved=(3.5 * n, 5.5 * n, 0.0), saved=0.5 * n)


def embedding(rows: int, vocabulary: int, width: int) -> Op:
    """Rows picked from a table; backward adds them up in a gradient as large as the table.

    Kept are the ids: integers of 8 bytes, counted as two elements.
    """
    n = rows * width
    return Op(
        "embedding", (rows, vocabulary, width), moved=(2.0 * n, 0.0, 2.0 * n + vocabulary * width),
        saved=2.0 * rows, parameters=(vocabulary * width,), high=2.0 * rows,
    )  # fmt: skip


def cross_entropy(rows: int, classes: int, *, parallel: bool = False) -> Op:
    """Softmax and the target's logarithm: three moves forward, two backward; the logits are kept.

    Args:
        parallel: over ranks that hold a part of the classes each; those keep the probabilities, in float32.
    """
    n = rows * classes
    sums = 4.0 * rows  # (2, rows) of row sums and the targets' integers
    return Op(
        "cross_entropy", (rows, classes), moved=(3.0 * n, 2.0 * n, 0.0), saved=n + sums,
        high=sums + (n if parallel else 0),
    )  # fmt: skip


def convolution(
    samples: int, channels: int, outputs: int, size: int, kernel: int, stride: int = 1, *,
    keeps_input: bool = False, first: bool = False,
) -> Op:  # fmt: skip
    """A square convolution as a matrix product: 2·N·O·C·k²·H'·W' operations in each pass.

    Chellapilla, Puri and Simard 2006, "High performance convolutional neural networks for document
    processing": each output pixel is a row of C·k² unfolded inputs times the weights.

    Args:
        size: height and width of the input; the output's are ⌈size/stride⌉ (padding ⌊k/2⌋).
    """
    out = -(-size // stride)
    pixels, taps = samples * out * out, channels * kernel * kernel
    unfolded = float(pixels * taps) if kernel > 1 else 0.0
    image = float(samples * channels * size * size)
    return Op(
        f"conv{kernel}s{stride}", (samples, channels, outputs, size),
        forward=(Matmul(pixels, taps, outputs),),
        input=() if first else (Matmul(pixels, outputs, taps),),
        weight=(Matmul(outputs, pixels, taps),),
        moved=(unfolded, 0.0 if first else unfolded + image, unfolded),
        saved=image if keeps_input else 0.0,
        parameters=(outputs * taps,),
        cast=0.0 if keeps_input else image,
    )  # fmt: skip


def group_norm(samples: int, channels: int, size: int, groups: int) -> Op:
    """(N, C, H, W) normalised within groups of channels; the same moves as layer norm."""
    n = samples * channels * size * size
    return Op(
        "group_norm", (samples, channels, size), moved=(2.0 * n, 3.0 * n, float(n)),
        saved=n + 2.0 * samples * groups, parameters=(channels, channels), high=n + 2.0 * samples * groups,
    )  # fmt: skip


def global_pool(samples: int, channels: int, size: int) -> Op:
    """The mean over all pixels: one read forward, one write backward."""
    n = float(samples * channels * size * size)
    return Op("global_pool", (samples, channels, size), moved=(n, n, 0.0))


def gpt_flops(batch: int, seq_len: int, layers: int, width: int, vocab: int, recompute: bool) -> float:
    """Return the floating-point operations of one training step of a GPT.

    96·B·s·l·h²·(1 + s/(6h) + V/(16lh)) with recomputation (Narayanan et al. 2021, equation 3), which counts
    forward four times for the layers and three times for the logits; 72 and V/(12lh) without.
    """
    b, s, l, h = batch, seq_len, layers, width
    if recompute:
        return 96.0 * b * s * l * h * h * (1 + s / (6 * h) + vocab / (16 * l * h))
    return 72.0 * b * s * l * h * h * (1 + s / (6 * h) + vocab / (12 * l * h))


def gpt_parameters(layers: int, width: int, vocab: int, seq_len: int) -> int:
    """Return the number of parameters of a GPT with tied embeddings.

    12·l·h² + 13·l·h + (V + s)·h (Narayanan et al. 2021, equation 2), and 2·h of the last norm.
    """
    return 12 * layers * width**2 + 13 * layers * width + (vocab + seq_len) * width + 2 * width
