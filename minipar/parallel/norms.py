"""The global gradient norm, equal to the serial one under any layout: each element counted exactly once.

A rank sums the squares of what it holds. What is spread over ranks (tensor-parallel shards, the flat shards
of ZeRO) adds up over them; what they all hold alike must enter one rank's sum only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from minipar.comm.interface import Communicator
from minipar.nn import Parameter
from minipar.optim import squared_norm
from minipar.parallel.placement import is_sharded
from minipar.tensor import Tensor


def global_norm(
    pairs: Iterable[tuple[Parameter, Tensor]],
    *,
    shard_comm: Communicator | None = None,
    tp: Communicator | None = None,
) -> float:
    """Return the 2-norm of all gradients, the same on every rank; to be handed to `clip_grad_norm_`.

    Collective: one all-reduce of one number over each communicator given.

    Args:
        pairs: each parameter once (a tied one too), with the tensor that holds its `.grad` here: itself, or
            its shard. A gradient that is None counts nothing.
        shard_comm: the tensors are disjoint shards over these ranks (ZeRO); None: whole on each of them.
        tp: the ranks over which the parameters are placed; a parameter that is not cut over them counts on
            rank 0 only.
    """
    total = squared_norm(t.grad for p, t in pairs if tp is None or tp.rank == 0 or is_sharded(p))
    sums = np.array([total])
    for comm in (shard_comm, tp):
        if comm is not None:
            comm.all_reduce_(sums)
    return math.sqrt(sums[0])
