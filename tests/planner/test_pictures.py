"""Pictures of plans, fits and timelines: drawn from numbers alone, without pyplot's global state."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipar import plot
from minipar.parallel.pipeline.schedules import one_f_one_b
from minipar.parallel.pipeline.simulator import Costs, simulate

DRAW = {
    "memory_bars": lambda path: plot.memory_bars(
        {"rank 0": {"parameters": 1e6, "activations": 2e6}, "rank 1": {"parameters": 3e6}}, path, limit=4e6
    ),
    "plan_comparison": lambda path: plot.plan_comparison(
        {"dp 2": {"computation": 0.1, "sums": 0.02}, "tp 2": {"computation": 0.2}}, path, measured={"dp 2": 0.13}
    ),
    "scaling_curve": lambda path: plot.scaling_curve({"a": {1: 10.0, 2: 19.0, 4: 30.0}, "b": {1: 5.0, 4: 19.0}}, path),
    "communication_fit": lambda path: plot.communication_fit(
        {"send": [(8.0, 1e-6), (1e6, 1e-3)]}, {"send": (1e-6, 1e-9)}, path
    ),
    "gantt_pair": lambda path: plot.gantt_pair(
        simulate(one_f_one_b(2, 4)), simulate(one_f_one_b(2, 4), Costs(1.1, 0.9, 1.2)), path, unit="ms"
    ),
    "loss_curves": lambda path: plot.loss_curves({"a": [3.0, 2.0], "b": [3.1, 2.2]}, path),
}


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_drawn(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    DRAW[name](path)
    head = path.read_bytes()[:8]
    assert head.startswith(b"\x89PNG") if suffix == ".png" else path.read_text().lstrip().startswith("<?xml")


def test_the_old_names_are_still_there() -> None:
    for name in ("COLOURS", "new_figure", "smoothed", "loss_curves", "partition_bars", "gantt", "precision_histograms"):
        assert hasattr(plot, name)
