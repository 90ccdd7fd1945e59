"""`minipar compare`: what it reads from runs, the table, and which runs are points of one scaling curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minipar.commands.compare import Past, past_run, scaling
from tests.commands.command_line import SMALL, assert_one_line, minipar


def run(directory: Path, ranks: int, speed: float, steps: int = 4, **config: Any) -> Path:
    """Write what a run on so many ranks leaves, a slow first step included."""
    directory.mkdir(parents=True)
    settings = {"model": "mlp", "dp": None, "pp": 1, "tp": 1, "zero": 0, "batch": 6, "width": 8, **config}
    facts = {"config": settings, "ranks": ranks, "data": {}, "vocabulary": None, "validation": None}
    (directory / "config.json").write_text(json.dumps(facts))
    speeds = [1.0, *[speed] * (steps - 1)]
    lines = [{"step": i + 1, "loss": 2.0 - i / 10, "samples_per_s": s, "seconds": 1.0} for i, s in enumerate(speeds)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_runs_of_the_same_work_are_a_scaling_curve(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", 1, 100.0), run(tmp_path / "b", 2, 150.0, dp=2, zero=1)
    c, d = run(tmp_path / "c", 2, 180.0, tp=2), run(tmp_path / "d", 4, 200.0, batch=12)
    runs = [past_run(place, place.name) for place in (a, b, c, d)]
    assert [r.speed for r in runs] == [100.0, 150.0, 180.0, 200.0]
    assert [r.layout for r in runs] == ["", "dp 2 × ZeRO 1", "tp 2", ""]
    assert scaling(runs) == {"mlp": {1: 100.0, 2: 180.0}}  # the faster of two; another batch is other work
    more = past_run(run(tmp_path / "e", 8, 400.0, batch=12), "e")
    assert scaling([*runs, more]) == {"mlp, a": {1: 100.0, 2: 180.0}, "mlp, d": {4: 200.0, 8: 400.0}}
    shown = minipar("compare", a, b, c, "--png", tmp_path / "x.png")
    assert shown.code == 0 and "75%" in shown.out and "90%" in shown.out, shown.out
    assert (tmp_path / "x.png").stat().st_size > 1000 and (tmp_path / "x-scaling.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "other",
    [
        dict(patch=2), dict(dropout=0.1), dict(tied=False), dict(optimizer="sgd"), dict(recompute=True),
        dict(precision_policy="p.toml"), dict(momentum=0.9), dict(weight_decay=0.1), dict(clip=0.0),
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_the_work_of_a_step_is_another_curve(other: dict[str, Any], tmp_path: Path) -> None:
    usual = dict(patch=4, dropout=0.0, tied=True, optimizer="adamw", recompute=False, momentum=0.0, clip=1.0)
    a, b = run(tmp_path / "a", 1, 100.0, **usual), run(tmp_path / "b", 2, 150.0, **{**usual, **other})
    c = run(tmp_path / "c", 2, 180.0, **{**usual, "clip": 0.5, "lr": 0.1, "zero": 1})
    first, second, third = (past_run(place, place.name) for place in (a, b, c))
    assert scaling([first, second]) == {} and scaling([first, third]) == {"mlp": {1: 100.0, 2: 180.0}}


def test_runs_that_were_trained(tmp_path: Path) -> None:
    for name, words in (("one", []), ("two", ["--ranks", 2])):
        done = minipar("train", "mlp", *SMALL["mlp"], "--steps", 4, "--out", tmp_path / name, *words)
        assert done.code == 0, done
    found: Past = past_run(tmp_path / "two", "two")
    assert (found.ranks, found.first, len(found.losses)) == (2, 1, 4) and found.validation is not None
    shown = minipar("compare", tmp_path / "one", tmp_path / "two", "--png", tmp_path / "c.svg")
    assert shown.code == 0 and "of ideal" in shown.out and (tmp_path / "c-scaling.svg").exists()


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    good = run(tmp_path / "good", 1, 9.0)
    assert_one_line(minipar("compare", tmp_path / "none"), 2, "holds no run", "minipar train")
    assert_one_line(minipar("compare", good, good), 2, "give each run once")
    assert_one_line(minipar("compare", good, "--png", tmp_path / "x.txt"), 1, "cannot be written")
    (good / "metrics.jsonl").write_text("")
    assert_one_line(minipar("compare", good), 2, "has not taken a step")
    (good / "config.json").write_text('{"config": {}}')
    assert_one_line(minipar("compare", good), 1, "is damaged")
