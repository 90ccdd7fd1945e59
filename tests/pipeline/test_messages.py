"""What a pipeline sends, holds and agrees on, exactly: messages and bytes, live activations, the clipping norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minipar
from minipar.comm.interface import Communicator
from minipar.data import Batch
from minipar.parallel.pipeline.formulas import FORMULAS
from minipar.training import Job
from tests.pipeline.runs import EIGHT, settings

SCHEDULES = ("naive", "gpipe", "1f1b", "zb-h1", "interleaved")
BYTES = 8  # of a float64


def one_step(job: Job, comm: Communicator) -> Batch:
    """Take one step with an empty ledger at its start."""
    batch = next(iter(job.loader))
    comm.ledger.reset()
    job.forward_backward(batch)
    return batch


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("p, m", [(2, 4), (3, 6)])
def test_messages_and_bytes(schedule: str, p: int, m: int) -> None:
    """Each boundary between virtual stages carries every sample's activation forward and its gradient back."""
    config = settings("gpt", pp=p, schedule=schedule, microbatches=m)
    v = 2 if schedule == "interleaved" else 1
    sample = 6 * 16 * BYTES  # (T, width)

    def run() -> dict[Any, Any]:
        comm = minipar.world()
        batch = one_step(Job(config, comm), comm)
        assert batch.samples == 9  # m divides it for none of these: the microbatches are unequal
        return comm.ledger.as_dict()

    for rank, found in enumerate(minipar.launch(run, p, timeout=30)):
        forward = sum(k + 1 < p * v for k in range(rank, p * v, p))  # of its virtual stages, those that send on
        back = sum(k > 0 for k in range(rank, p * v, p))
        name = "world/pp0"
        assert found["send", name][::2] == (m * (forward + back), 9 * sample * (forward + back))
        assert found["recv", name][::2] == (m * (forward + back), 9 * sample * (forward + back))
        # The loss's value, told to all stages and to the ranks that share the batch; a tied weight's two uses.
        assert found["all_reduce", name] == (1, 1, BYTES)
        groups = {group for operation, group in found if operation == "all_reduce"}
        tied = {f"{name}/tied0"} if rank in (0, p - 1) else set()
        assert groups == {name, f"world/dp{rank}"} | tied


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("p, m", [(3, 6), (4, 8)])
def test_live_activations_are_the_formulas(schedule: str, p: int, m: int) -> None:
    """The executor holds as many as the formula says: in chunks for interleaved, until W for ZB-H1."""
    config = settings("gpt", pp=p, schedule=schedule, microbatches=m)
    v = 2 if schedule == "interleaved" else 1

    def run() -> int:
        job = Job(config, minipar.world())
        job.forward_backward(next(iter(job.loader)))
        peak: int = job.strategy.executor.peak_live  # type: ignore[attr-defined]
        return peak

    expected = [FORMULAS[schedule].live(s, p, m, v) for s in range(p)]
    assert minipar.launch(run, p, timeout=30) == expected


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_runs_each_block_forward_again(recompute: bool) -> None:
    config = settings("mlp", pp=2, microbatches=3, recompute=recompute)

    def run() -> list[int]:
        job = Job(config, minipar.world())
        blocks = job.strategy.stage.blocks  # type: ignore[attr-defined]
        calls = [0] * len(blocks)

        def counted(i: int, forward: Any) -> Any:
            def call(x: Any) -> Any:
                calls[i] += 1
                return forward(x)

            return call

        for i, block in enumerate(blocks):
            block.forward = counted(i, block.forward)
        job.forward_backward(next(iter(job.loader)))
        return calls

    for calls in minipar.launch(run, 2, timeout=20):
        assert set(calls) == {6 if recompute else 3}


@pytest.mark.parametrize(
    "layout",
    [dict(dp=2, pp=2, tp=2), dict(dp=2, pp=2, tp=2, zero=1), dict(dp=4, pp=2, zero=1), dict(pp=4, tp=2)],
    ids=lambda layout: " ".join(f"{k}{n}" for k, n in layout.items()),
)
def test_the_clipping_norm_is_the_serial_one_on_every_rank(layout: dict[str, int]) -> None:
    config = settings("gpt", **{**EIGHT, **layout, "layers": 4, "clip": 0.0})
    plain = settings("gpt", **{**EIGHT, "layers": 4, "clip": 0.0})

    def norm(config: Any, comm: Communicator) -> float:
        job = Job(config, comm)
        job.forward_backward(next(iter(job.loader)))
        found = job.strategy.grad_norm()
        assert found is not None
        return found

    def serial() -> float:
        return norm(plain, minipar.world())

    expected = minipar.launch(serial, 1)[0]
    found = minipar.launch(lambda: norm(config, minipar.world()), 8, timeout=30)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(set(found)) == 1, "bitwise the same on every rank"


def test_traffic_of_two_by_two_by_two() -> None:
    """3D with ZeRO 1: the calls and elements of a step over each axis are the formulas'."""
    m, blocks, local = 4, 4, 3  # microbatches, blocks, samples of each replica
    activation = local * EIGHT["seq_len"] * EIGHT["width"]  # elements, all microbatches together
    config = settings("gpt", **{**EIGHT, "layers": blocks}, dp=2, pp=2, tp=2, zero=1, microbatches=m)

    def run() -> tuple[int, dict[Any, Any], dict[str, int]]:
        comm = minipar.world()
        job = Job(config, comm)
        batch = one_step(job, comm)
        job.update(batch)
        held = job.strategy.stage.held  # type: ignore[attr-defined]
        return job.mesh.place["pp"], comm.ledger.as_dict(), {name: p.data.size for name, p in held.items()}

    for stage, found, held in minipar.launch(run, 8, timeout=30):
        over = {(op, group.split("/")[-1][:2], "tied" in group): row[:2] for (op, group), row in found.items()}
        # Between the stages: an activation forward, or its gradient back; the loss's value and the norm; the
        # tied weight's two uses.
        assert over.pop(("send", "pp", False)) == over.pop(("recv", "pp", False)) == (m, activation)
        assert over.pop(("all_reduce", "pp", False)) == (2, 2)
        assert over.pop(("all_reduce", "ti", True)) == (1, held["wte.weight"])
        # Tensor parallel: two all-reduces a block each way, one of the embedding forward or of the head's
        # input back, on the last stage the loss's two (largest logit; sum and target); the norm once.
        each = 4 * (blocks // 2) + 1
        targets = local * EIGHT["seq_len"]
        loss = (0, 0) if stage == 0 else (2 * m, 3 * targets)
        assert over.pop(("all_reduce", "tp", False)) == (each * m + loss[0] + 1, each * activation + loss[1] + 1)
        # ZeRO 1: gradients scattered, weights gathered, a unit for each block and one for the rest; the tied
        # weight's sum over replicas, which parameters were used, the loss's value, and the norm.
        assert over.pop(("reduce_scatter", "dp", False)) == (blocks // 2 + 1, sum(held.values()))
        assert over.pop(("all_gather", "dp", False)) == (blocks // 2 + 1, sum(held.values()))
        assert over.pop(("all_reduce", "dp", False)) == (4, held["wte.weight"] + len(held) + 2)
        assert not over, over
