"""Equal to serial under real MPI: what `mpi_verify` lists, in jobs of two, three and four ranks."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipar.comm.launcher import run_mpi
from tests.parallel import refusals
from tests.parallel.layout_cases import CASES, check
from tests.parallel.mpi_verify import CONFIGURATIONS

pytestmark = pytest.mark.mpi
SCRIPT = Path(__file__).parent / "mpi_verify.py"
LIMIT = 100.0  # seconds for a job, which takes about 5 where nothing else runs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """A job for each number of ranks that a test asks for, run once."""

    @functools.cache
    def run(ranks: int) -> dict[str, Any]:
        file = tmp_path_factory.mktemp("verify") / "found.json"
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root}
        assert run_mpi([sys.executable, str(SCRIPT), str(file)], ranks, timeout=LIMIT, env=environment) == 0
        found: dict[str, Any] = json.loads(file.read_text())
        assert {result["ranks"] for result in found.values()} == {ranks}
        return found

    return run


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in CASES for name in CASES[ranks]])
def test_layouts(ranks: int, name: str, found: Callable[[int], dict[str, Any]]) -> None:
    check(CASES[ranks][name], found(ranks)[name])


def test_refusals(found: Callable[[int], dict[str, Any]]) -> None:
    refusals.check(found(3)["refusals"]["told"])


@pytest.mark.parametrize("ranks", (2, 3))
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_serial(name: str, ranks: int, found: Callable[[int], dict[str, Any]]) -> None:
    result = found(ranks)[name]
    kinds = {"loss", "weight"} if "local" in name else {"loss", "weight", "gradient"}
    assert result["errors"].keys() == kinds
    for kind in kinds:
        assert result["errors"][kind] <= 1e-10, kind
        assert result["compared"][kind] > 0, kind
    assert result["replicas_differ"] == 0 and result["holds"]


def test_plain_mpirun_is_enough() -> None:
    """Without minipar's launcher, as on a cluster."""
    from minipar.comm.launcher import find_mpirun, is_open_mpi, job_environment

    program = find_mpirun()
    environment = job_environment(2, is_open_mpi(program))
    del environment["MINIPAR_WORLD_SIZE"]
    command = [program, "-n", "2", sys.executable, "-m", "minipar", "verify", "mlp", "--steps", "2"]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("mlp on 2 ranks") == 1 and "DIFFER" not in job.stdout
    assert job.stderr == ""
