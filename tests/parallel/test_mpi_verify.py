"""Equal to serial under real MPI: what `mpi_verify` lists, in a job of two ranks and one of four."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minipar.comm.launcher import run_mpi
from tests.parallel.mpi_verify import CONFIGURATIONS

pytestmark = pytest.mark.mpi
SCRIPT = Path(__file__).parent / "mpi_verify.py"
LIMIT = 100.0  # seconds for a job, which takes about 5


@pytest.fixture(scope="module", params=(2, 4))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("verify") / "found.json"
    code = run_mpi([sys.executable, str(SCRIPT), str(file)], request.param, timeout=LIMIT)
    assert code == 0
    found: dict[str, Any] = json.loads(file.read_text())
    assert {result["ranks"] for result in found.values()} == {request.param}
    return found


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_serial(name: str, found: dict[str, Any]) -> None:
    result = found[name]
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
