"""A pipeline whose second stage raises in the backward of microbatch 1: `mpirun -n 2 python mpi_failing_stage.py`."""

from __future__ import annotations

from typing import Any

import minipar
from minipar.parallel.pipeline.action import Action
from minipar.training import Job
from tests.pipeline.runs import settings


def main() -> None:
    comm = minipar.world()
    job = Job(settings("gpt", pp=2, microbatches=4), comm)
    executor = job.strategy.executor  # type: ignore[attr-defined]
    backward = executor._backward

    def failing(action: Action, *arguments: Any) -> Any:
        if comm.rank == 1 and action.microbatch == 1:
            raise ArithmeticError("planted")
        return backward(action, *arguments)

    executor._backward = failing
    for _ in job.train():
        pass


if __name__ == "__main__":
    main()
