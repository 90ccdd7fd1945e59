"""ZeRO on real MPI: `mpirun -n 4 python zero_mpi.py`; each rank prints "equal" if everything was."""

from typing import Any

import numpy as np

from minipar import Tensor, nn, world
from minipar.comm import Communicator
from minipar.comm.mpi import MPICommunicator
from minipar.models import Model
from minipar.parallel.zero.gather import at_backward
from minipar.parallel.zero.zero import Zero
from tests.parallel.training_runs import assert_equal_steps
from tests.parallel.zero_runs import loss_of, norms_of, serial, train, train_branching, train_over_cut_model


class Meeting(nn.Module):
    """A linear layer before which the ranks meet, in forward and in backward, so that messages can arrive.

    By MPI's own barrier: in a communicator's, a rank that waits goes on with what it has begun.
    """

    def __init__(self, mpi: Any):
        self.mpi, self.fc = mpi, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.mpi.Barrier()
        return self.fc(at_backward(x, self.mpi.Barrier))


class Meetings(nn.Module):
    """Many of them; calls `note()` at the end of its forward and of its backward."""

    def __init__(self, mpi: Any):
        self.steps, self.note = nn.ModuleList([Meeting(mpi) for _ in range(10)]), lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = at_backward(x, lambda: self.note())
        for step in self.steps:
            x = step(x)
        self.note()
        return x


class Slow(Model):
    def __init__(self, mpi: Any):
        self.layers = nn.ModuleList([Meetings(mpi) for _ in range(3)])
        self.blocks = list(self.layers)
        self.loss = nn.CrossEntropyLoss(reduction="sum")


def the_next_gather_travels_while_a_unit_computes(comm: Communicator) -> None:
    """By the end of a unit's forward, and of its backward, the data of the next one's gather has been begun."""
    meet = comm.split(0)
    assert comm.checks and isinstance(meet, MPICommunicator)
    model, begun = Slow(meet.mpi), []
    zero = Zero(model, comm, 3).materialize(0, "float64")

    def note() -> None:
        under_way: Any = zero.gathers._under_way.values()  # type: ignore[union-attr]
        begun.extend(work._data is not None for work in under_way)

    for block in model.blocks:
        block.note = note
    loss_of(zero, np.ones((2, 3)), np.array([0, 1])).backward()
    assert begun == [True] * 4, begun  # two gathers ahead in forward, two in backward


def main() -> None:
    comm = world()
    three = comm.split(0 if comm.rank < 3 else None)
    clipped = serial("gpt-tied", clip=0.3, steps=2)
    for stage in (1, 2, 3):
        for kind, k in (("gpt-tied", 3), ("uneven", 1), ("convnet-batch-norm", 1)):
            ours = train(comm, kind, stage, "momentum", k=k, steps=2)
            assert_equal_steps(ours, serial(kind, "momentum", steps=2))
        train_over_cut_model(comm, stage, stage > 1, 0.3, clipped, norms_of(clipped))
        for prefetch in (True, False):
            if three is not None:
                train_branching(three, stage, prefetch)
    the_next_gather_travels_while_a_unit_computes(comm)
    print("equal")


main()
