"""Floor 4: each kind of parallelism, as a wrapper around a serial model and a communicator.

Order within the floor: placement, norms; batch_norm, buckets, data_parallel, local_sgd; tensor_parallel; zero, memory;
partition; region; pipeline; strategies (each kind as the training job sees it); distribute, which composes
them all.
"""

from minipar.parallel.data_parallel import DataParallel
from minipar.parallel.local_sgd import LocalSGD
from minipar.parallel.tensor_parallel.parallelize import parallelize
from minipar.parallel.zero.zero import Zero

__all__ = ["DataParallel", "LocalSGD", "Zero", "parallelize"]
