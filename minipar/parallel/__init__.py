"""Floor 4: each kind of parallelism, as a wrapper around a serial model and a communicator.

Order within the floor: placement, norms; buckets, data_parallel, local_sgd; vocabulary, tensor_parallel,
conv_parallel, plans; flat_shards, gather, scatter_gradients, zero, memory; assignment, devices, stage_split,
partition, profile, layer_parallel, owner_sharding; pipeline; strategy; distribute, which composes them all.
"""

from minipar.parallel.data_parallel import DataParallel
from minipar.parallel.local_sgd import LocalSGD
from minipar.parallel.tensor_parallel import parallelize
from minipar.parallel.zero import Zero

__all__ = ["DataParallel", "LocalSGD", "Zero", "parallelize"]
