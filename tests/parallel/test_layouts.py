"""Every layout that the commands offer equals serial training, on threads; `test_mpi_verify` has them under MPI."""

import pytest

from minipar import launch, world
from tests.parallel.layout_cases import CASES, check, data_of, run


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in CASES for name in CASES[ranks]])
def test_equals_serial_and_is_what_was_asked_for(ranks: int, name: str) -> None:
    case = CASES[ranks][name]
    data = data_of(case.config)
    check(case, launch(lambda: run(case, world(), data), ranks, timeout=30)[0])
