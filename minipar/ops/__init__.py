"""The primitives: every differentiable operation of the engine.

One file a subject: `elementwise`, `shape`, `reduce`, `linalg`, `normalisation`, `attention`, `conv`,
`loss`, `dropout`; `methods` gives tensors their operators. Each primitive returns its value and its
vector-Jacobian product, side by side (see `minipar.tensor.primitive`).
"""

from minipar.ops.attention import scaled_dot_product_attention, self_attention
from minipar.ops.conv import avg_pool2d, conv2d, max_pool2d
from minipar.ops.dropout import dropout
from minipar.ops.elementwise import (
    abs,
    add,
    astype,
    clamp,
    cos,
    div,
    equal,
    erf,
    exp,
    gelu,
    greater,
    greater_equal,
    less,
    less_equal,
    log,
    maximum,
    minimum,
    mul,
    neg,
    not_equal,
    pow,
    relu,
    sigmoid,
    silu,
    sin,
    sqrt,
    square,
    sub,
    tanh,
    where,
)
from minipar.ops.linalg import einsum, embedding, linear, matmul, rounded
from minipar.ops.loss import cross_entropy, mse_loss
from minipar.ops.normalisation import (
    batch_norm,
    group_norm,
    layer_norm,
    log_softmax,
    normalise_channels,
    rms_norm,
    softmax,
)
from minipar.ops.reduce import amax, amin, argmax, cumsum, logsumexp, max, mean, min, prod, std, sum, var
from minipar.ops.shape import (
    broadcast_to,
    chunk,
    concat,
    contiguous,
    flatten,
    flip,
    gather,
    getitem,
    pad,
    permute,
    reshape,
    roll,
    split,
    squeeze,
    stack,
    swapaxes,
    transpose,
    tril,
    unsqueeze,
)

from minipar.ops import methods  # isort: skip  (installs the operators, so it comes last)
