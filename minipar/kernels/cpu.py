"""Every kernel for NumPy arrays; each subject is a file beside this one.

`im2col` and `col2im` are the plain ones: convolution itself unfolds less (see cpu_conv).
"""

from minipar.kernels.cpu_attention import attention, attention_backward
from minipar.kernels.cpu_conv import (
    conv2d,
    conv2d_backward_bias,
    conv2d_backward_input,
    conv2d_backward_weight,
)
from minipar.kernels.cpu_gelu import gelu, gelu_backward
from minipar.kernels.cpu_group_norm import group_norm, group_norm_backward
from minipar.kernels.cpu_linear import (
    bias_add_,
    embedding,
    embedding_backward,
    linear,
    linear_backward_bias,
    linear_backward_input,
    linear_backward_weight,
)
from minipar.kernels.cpu_norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from minipar.kernels.cpu_optim import adam_step_, sgd_step_
from minipar.kernels.cpu_pool import avg_pool2d, avg_pool2d_backward, max_pool2d, max_pool2d_backward
from minipar.kernels.cpu_random import dropout_mask, splitmix64
from minipar.kernels.cpu_softmax import (
    cross_entropy,
    cross_entropy_backward,
    log_softmax,
    log_softmax_backward,
    softmax,
    softmax_backward,
)
from minipar.kernels.plain import cast, split_heads
from minipar.kernels.plain_conv import col2im, im2col

__all__ = [
    "adam_step_", "attention", "attention_backward", "avg_pool2d", "avg_pool2d_backward", "bias_add_", "cast",
    "col2im", "conv2d", "conv2d_backward_bias", "conv2d_backward_input", "conv2d_backward_weight",
    "cross_entropy", "cross_entropy_backward", "dropout_mask", "embedding", "embedding_backward", "gelu",
    "gelu_backward", "group_norm", "group_norm_backward", "im2col", "layer_norm", "layer_norm_backward",
    "linear", "linear_backward_bias", "linear_backward_input", "linear_backward_weight", "log_softmax",
    "log_softmax_backward", "max_pool2d", "max_pool2d_backward", "rms_norm", "rms_norm_backward", "sgd_step_",
    "softmax", "softmax_backward", "split_heads", "splitmix64",
]  # fmt: skip
