"""Runs that are killed again and again while they save end where the uncut run does: every loss, every bit of state."""

import json
from pathlib import Path

import pytest

from minipar.checkpoint import checkpoints, open_checkpoint
from tests.checkpoint.jobs import assert_same, saved_state
from tests.checkpoint.killed_runs import in_the_middle
from tests.faults.running import mpirun, needs_proc, python

pytestmark = [pytest.mark.faults, needs_proc]
KILLS = 20  # that come in the middle of a save; others do not count
MODULE = "tests.checkpoint.killed_runs"


def losses(file: Path) -> dict[int, set[str]]:
    """Return all losses that were written for each step: steps that a kill undid are done again."""
    found: dict[int, set[str]] = {}
    for line in file.read_text().splitlines():
        step, loss = line.split()
        found.setdefault(int(step), set()).add(loss)
    return found


def assert_as_uncut(cut: Path, uncut: Path, steps: int) -> None:
    expected = losses(uncut / "losses")
    assert sorted(expected) == list(range(1, steps + 1)) and all(len(found) == 1 for found in expected.values())
    assert losses(cut / "losses") == expected
    assert_same(saved_state(cut / "saved"), saved_state(uncut / "saved"))
    for path in checkpoints(cut / "saved"):
        open_checkpoint(path)


@pytest.mark.timeout(300)
def test_killed_during_many_saves_a_run_ends_as_the_uncut_one(tmp_path: Path) -> None:
    done = python(MODULE, tmp_path, KILLS, limit=280.0)
    assert done.code == 0 and not done.orphans, done
    found = json.loads(done.out)
    assert found["struck"] >= KILLS
    assert_as_uncut(tmp_path, tmp_path / "uncut", found["steps"])


@pytest.mark.mpi
@pytest.mark.timeout(200)
def test_ranks_killed_under_mpi_while_they_save(tmp_path: Path) -> None:
    """Each rank in turn, at the beginning of a save and within it; step 2 k + 2 is the second after resuming."""
    steps, struck = 12, 0
    for rank, milliseconds in ((1, 0), (0, 2), (1, 4), (0, 8)):
        first = max((int(path.name.split("-")[1]) for path in checkpoints(tmp_path / "saved")), default=0)
        job = mpirun(2, MODULE, str(tmp_path), str(steps), str(rank), str(milliseconds))
        assert job.code != 0 and not job.orphans, job
        struck += in_the_middle(tmp_path / "saved", first + 2)
    assert struck, "at least the kill at the beginning came in the middle"
    (tmp_path / "uncut").mkdir()
    for place in (tmp_path, tmp_path / "uncut"):
        job = mpirun(2, MODULE, str(place), str(steps))
        assert job.code == 0 and not job.orphans, job
    assert_as_uncut(tmp_path, tmp_path / "uncut", steps)
