"""The scenarios on real MPI: one job for each number of ranks."""

import json
from pathlib import Path

import pytest
from comm_scenarios import SCENARIOS
from mpi_helpers import HERE, mpirun

pytestmark = pytest.mark.mpi

Outcomes = dict[int, list[dict[str, str | None]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    found: Outcomes = {}
    for ranks in (2, 3, 4):
        directory: Path = tmp_path_factory.mktemp(f"ranks{ranks}")
        job = mpirun(ranks, HERE / "mpi_scenarios.py", str(directory), launched=True, MINIPAR_TIMEOUT="20")
        files = [directory / f"rank{rank}.json" for rank in range(ranks)]
        assert job.code == 0, job.out + job.err
        found[ranks] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.mark.parametrize("ranks", (2, 3, 4))
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_on_mpi(name: str, ranks: int, outcomes: Outcomes) -> None:
    for rank, outcome in enumerate(outcomes[ranks]):
        assert name in outcome, f"not reached: {list(outcome)[-1]} failed before it"
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"
