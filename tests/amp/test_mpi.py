"""Mixed precision under real MPI: what `mpi_amp` lists, in one job of four ranks."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from minipar.comm.launcher import run_mpi
from minipar.verification import TOLERANCE
from tests.amp.mpi_amp import BEFORE, LAYOUTS, STEPS
from tests.checkpoint.jobs import LOSS_TOLERANCE, assert_same, saved_state

pytestmark = pytest.mark.mpi
LIMIT = 100.0  # seconds for the job, which takes about 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("amp")
    assert run_mpi([sys.executable, "-m", "tests.amp.mpi_amp", str(place)], 4, timeout=LIMIT) == 0
    return place


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((place / "found.json").read_text())
    return read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_equals_serial_fp16(layout: str, found: dict[str, Any]) -> None:
    result = found[layout]
    assert result["tolerance"] == TOLERANCE["fp16"] and result["holds"]
    assert result["errors"].keys() == {"loss", "gradient", "weight"}
    for kind, error in result["errors"].items():
        assert error <= result["tolerance"], kind
        assert result["compared"][kind] >= 4 * STEPS, kind


def test_bf16_sums_activations_over_tensor_parallel_ranks(found: dict[str, Any]) -> None:
    """MPI knows no sum of bfloat16."""
    assert found["bf16"]["tolerance"] == TOLERANCE["bf16"] and found["bf16"]["holds"], found["bf16"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overflow_on_one_rank_makes_all_skip(layout: str, found: dict[str, Any]) -> None:
    assert found[layout]["skipped"] == [[True, False, 2.0**15, 1]] * 4


def test_saved_by_four_ranks_and_loaded_by_two(place: Path, found: dict[str, Any]) -> None:
    four, two = saved_state(place / "four"), saved_state(place / "two")
    assert_same(four, two)
    scaler = four[1]["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"], four[1]["skipped"]) == (2.0**15, BEFORE - 1, 1)
    losses = found["resharded"]
    assert losses["two"] == pytest.approx(losses["four"], rel=LOSS_TOLERANCE["fp16"])
