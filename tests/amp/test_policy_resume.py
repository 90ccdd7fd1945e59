"""A run that is saved and resumed decides as the uncut one: while it still counts, and after it has decided."""

from pathlib import Path
from typing import Any

import pytest

from minipar import launch, world
from minipar.amp.policy import PolicyConfig
from minipar.checkpoint import newest, open_checkpoint
from minipar.errors import UsageError
from minipar.resume import resume, save_job
from minipar.training import Job
from tests.checkpoint.jobs import LOSS_TOLERANCE, job, steps

TOTAL = 5


def made(file: Path, **layout: Any) -> Job:
    return job(world(), "gpt", amp="fp16", dtype=None, precision_policy=str(file), steps=TOTAL, dropout=0.0, **layout)


def found(run: Job) -> tuple[Any, ...]:
    """Return what the policy knows, and what autocast was told of it."""
    policy, casting = run.precision.policy, run.precision._autocast
    assert policy is not None and casting is not None
    counts = {name: (policy.values[name].state(), policy.gradients[name].state()) for name in sorted(policy.values)}
    return {name: policy.decisions[name] for name in sorted(policy.decisions)}, counts, casting.float32_parameters


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text('observe = 3\ngradient_underflow = 0.0005\nfloat32 = ["h.1.attn.c_proj.*"]\n')
    return path


def uncut(file: Path, **layout: Any) -> tuple[list[float], tuple[Any, ...]]:
    run = made(file, **layout)
    return steps(run, TOTAL), found(run)


def cut(file: Path, place: Path, at: int, before: dict[str, Any]) -> list[float]:
    run = made(file, **before)
    losses = steps(run, at)
    save_job(run, place)
    return losses


def rest(file: Path, place: Path, at: int, after: dict[str, Any]) -> tuple[list[float], tuple[Any, ...]]:
    run = made(file, **after)
    resume(run, place)
    return steps(run, TOTAL - at), found(run)


@pytest.mark.parametrize("at", (2, 4), ids=("counting", "decided"))
@pytest.mark.parametrize(
    ("ranks", "before", "others", "after"),
    ((2, {}, 2, {}), (2, {"zero": 1}, 3, {}), (2, {"tp": 2, "dp": 1}, 1, {})),
    ids=("same", "zero to 3 ranks", "tp to 1 rank"),
)
def test_a_resumed_run_decides_as_the_uncut_one(
    at: int, ranks: int, before: dict[str, Any], others: int, after: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    whole, known = launch(uncut, others, file, **after)[0]
    begun = launch(cut, ranks, file, tmp_path / "saved", at, before)[0]
    ended = launch(rest, others, file, tmp_path / "saved", at, after)
    for losses, knows in ended:
        decisions, counts, stay = knows
        assert {n: d.dtype for n, d in decisions.items()} == {n: d.dtype for n, d in known[0].items()}
        assert stay == known[2] and 0 < len(stay) < len(decisions)
        assert counts.keys() == known[1].keys() and all(v and g for v, g in counts.values())
        if ranks == others and before == after:
            assert knows == known and begun + losses == whole, "bitwise"
        assert begun + losses == pytest.approx(whole, rel=LOSS_TOLERANCE["fp16"])


def test_other_thresholds_are_refused(file: Path, tmp_path: Path) -> None:
    launch(cut, 2, file, tmp_path / "saved", 2, {})
    file.write_text("observe = 2\n")

    def program() -> str:
        with pytest.raises(UsageError) as caught:
            resume(made(file), tmp_path / "saved")
        return str(caught.value)

    messages = launch(program, 2)
    assert messages[0] == messages[1] and "other thresholds" in messages[0] and "observe=3" in messages[0]


def test_the_state_is_small_and_holds_the_thresholds(file: Path, tmp_path: Path) -> None:
    launch(cut, 2, file, tmp_path / "saved", 2, {})
    state = open_checkpoint(newest(tmp_path / "saved")).scalars["policy"]
    assert PolicyConfig(**{**state["config"], "float32": tuple(state["config"]["float32"])}) == PolicyConfig.read(file)
    assert state["steps"] == 2 and not state["decisions"] and "h.0.mlp.c_fc.weight" in state["used"]
