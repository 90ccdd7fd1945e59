"""ZeRO on real MPI: `mpirun -n 3 python zero_mpi.py`; each rank prints "equal" if everything was."""

from minipar import world
from tests.parallel.training_runs import assert_equal_steps
from tests.parallel.zero_runs import serial, train, train_branching


def main() -> None:
    comm = world()
    for stage in (1, 2, 3):
        for kind, k in (("gpt-tied", 3), ("convnet-batch-norm", 1)):
            ours = train(comm, kind, stage, "momentum", k=k, steps=2)
            assert_equal_steps(ours, serial(kind, "momentum", steps=2))
        for prefetch in (True, False):
            train_branching(comm, stage, prefetch)
    print("equal")


main()
