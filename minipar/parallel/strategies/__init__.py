"""What the training job asks of a kind of parallelism (`Strategy`), and one small class for each kind.

In reading order: strategy (the interface), replicas, sharded, layers, pipelined.
"""

from minipar.parallel.strategies.layers import Layers
from minipar.parallel.strategies.pipelined import Pipelined
from minipar.parallel.strategies.replicas import AveragedParameters, Replicas
from minipar.parallel.strategies.sharded import ByOwner, Sharded
from minipar.parallel.strategies.strategy import HeldTensor, Strategy, matrix_like

__all__ = [
    "AveragedParameters", "ByOwner", "HeldTensor", "Layers", "Pipelined", "Replicas", "Sharded", "Strategy",
    "matrix_like",
]  # fmt: skip
