"""minipar: a reference engine for learning how large models are trained in parallel.

There is one model, and it is serial; each kind of parallelism is a wrapper from outside. The floors, each
importing only from those above it in this list:

    0  errors, backend, kernels          what goes wrong, where arrays live, fused loops,
       random, trace, files, units       counter-based random numbers, spans, whole files, sizes in words
    1  tape, calls, tensor, ops,         reverse-mode differentiation and its primitives
       gradcheck
    2  nn, recompute, optim, flat, amp, data, models
    3  comm, agreement                   communicators on threads and MPI, textbook collectives
    4  mesh, parallel, checkpoint        the kinds of parallelism, and `distribute`, which composes them
    5  config, layouts, timeline, plot, training, stopping, resume, weights, runs, verification, traces,
       planner, grading, doctor
    6  commands, cli                     the `minipar` command
"""

from minipar import nn, ops, optim
from minipar.comm import launch, world
from minipar.mesh import Mesh
from minipar.parallel.distribute import Recipe, distribute
from minipar.random import at
from minipar.tape import enable_grad, no_grad
from minipar.tensor import Tensor, tensor

__version__ = "0.1.0"

__all__ = [
    "Mesh", "Recipe", "Tensor", "at", "distribute", "enable_grad", "launch", "nn", "no_grad", "ops",
    "optim", "tensor", "world",
]  # fmt: skip
