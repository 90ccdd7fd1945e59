"""Tensor parallelism: each layer of a serial model cut over ranks, by a plan.

In reading order: parallelize (the walk over a plan), styles (linear layers, embeddings, sequence parallel),
vocabulary (a loss whose logits are cut), convolution (by output or input channel, or by image region),
plans (which style goes where in the MLP, the ConvNet and the GPT).
"""

from minipar.parallel.tensor_parallel.parallelize import Plan, Style, parallelize

__all__ = ["Plan", "Style", "parallelize"]
