"""Floor 4: each kind of parallelism, as a wrapper around a serial model and a communicator.

Order within the floor: buckets, data_parallel, local_sgd.
"""

from minipar.parallel.data_parallel import DataParallel
from minipar.parallel.local_sgd import LocalSGD

__all__ = ["DataParallel", "LocalSGD"]
