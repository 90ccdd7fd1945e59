"""Floor 3: communicators on raw arrays. Nothing here knows a Tensor, but for the last file.

Order of imports within the floor: ledger, clock, levels, guard, flight, member, interface, collectives; fabric, rounds,
threads; blas, wire, lines, watchdog, shared_memory, monitor, signals, hooks, progress, signatures, symmetric, mpi_work,
mpi; slow, launch, launcher; traced; differentiable. Start with `interface.py` (what every communicator can do), then
`collectives.py` (how an all-reduce is made of sends and receives).
"""

from minipar.comm.clock import Clock
from minipar.comm.interface import Communicator, Work
from minipar.comm.launch import launch, world
from minipar.comm.ledger import Ledger
from minipar.comm.member import balanced

__all__ = ["Clock", "Communicator", "Ledger", "Work", "balanced", "launch", "world"]
