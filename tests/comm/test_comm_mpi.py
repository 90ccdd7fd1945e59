"""The scenarios on real MPI: one job for each number of ranks."""

import json
from pathlib import Path

import pytest
from comm_scenarios import SCENARIOS
from mpi_helpers import HERE, mpirun

pytestmark = pytest.mark.mpi

JOBS = {"2": (2,), "3": (3,), "4": (4,), "3 apart": (3, "apart")}
Outcomes = dict[str, list[dict[str, str | None]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    found: Outcomes = {}
    for name, (ranks, *words) in JOBS.items():
        directory: Path = tmp_path_factory.mktemp("ranks")
        script = HERE / "mpi_scenarios.py"
        job = mpirun(ranks, script, str(directory), *words, launched=True, MINIPAR_TIMEOUT="20")
        files = [directory / f"rank{rank}.json" for rank in range(ranks)]
        assert job.code == 0, job.out + job.err
        found[name] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_on_mpi(name: str, job: str, outcomes: Outcomes) -> None:
    for rank, outcome in enumerate(outcomes[job]):
        assert name in outcome, f"not reached: {list(outcome)[-1]} failed before it"
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"


def test_a_plain_mpirun_leaves_each_rank_one_blas_thread(tmp_path: Path) -> None:
    """Unless a variable says how many; the launcher sets them all."""
    script = tmp_path / "threads.py"
    script.write_text(
        "import numpy, threadpoolctl, minipar\n"
        "minipar.world().barrier()\n"
        "limited = [lib['num_threads'] for lib in threadpoolctl.threadpool_info() if lib['user_api'] == 'blas']\n"
        "everywhere = minipar.world().all_gather_object(set(limited))\n"
        "if minipar.world().rank == 0:\n"
        "    print(*everywhere, sep=';')\n"
    )
    plain = mpirun(2, script, OMP_NUM_THREADS=None, OPENBLAS_NUM_THREADS=None, MKL_NUM_THREADS=None)
    assert plain.code == 0 and plain.out.strip() == "{1};{1}", plain
    told = mpirun(2, script, OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2", MKL_NUM_THREADS=None)
    assert told.code == 0 and told.out.strip() == "{2};{2}", told


def test_groups_without_number_where_they_are_freed(tmp_path: Path) -> None:
    """And the limit of MPI, told in one line, where they are not; the program can free some and go on."""
    script = tmp_path / "groups.py"
    script.write_text(
        "import minipar\n"
        "from minipar.errors import CommunicationError\n"
        "comm = minipar.world()\n"
        "for _ in range(1100):\n"
        "    comm.split(0).free()\n"
        "try:\n"
        "    with comm.scope():\n"
        "        for _ in range(3000):\n"
        "            comm.split(0)\n"
        "except CommunicationError as error:\n"
        "    print(str(error).partition('(')[0])\n"
        "comm._groups[-1].free()\n"
        "comm.split(0).barrier()\n"
    )
    job = mpirun(2, script)
    assert job.code == 0, job.out + job.err
    assert job.out.count("split: MPI makes no more groups") == 2
