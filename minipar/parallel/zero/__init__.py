"""ZeRO: data parallelism in which no two ranks keep the same thing.

In reading order: zero (the wrapper), flat_shards (units of flat memory, cut over ranks), gather (parameters
there when they are used), scatter_gradients (each rank gets the sum of its range).
"""

from minipar.parallel.zero.zero import Zero

__all__ = ["Zero"]
