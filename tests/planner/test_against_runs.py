"""Predicted memory and traffic against what a run holds and sends: `parallel.memory.held` and the ledger."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minipar import launch, world
from minipar.config import TrainConfig
from minipar.parallel.memory import Held, held
from minipar.parallel.strategies.pipelined import Pipelined
from minipar.planner.fullest import fullest, whole_batch
from minipar.planner.layout import PRECISIONS, Layout, Precision, on_the_wire
from minipar.planner.memory import memory
from minipar.planner.run_layouts import config_of
from minipar.planner.shapes import Shape, shape_of
from minipar.planner.traffic import traffic
from minipar.training import Job, build_model, load_data

SMALL: dict[str, dict[str, Any]] = {
    "mlp": dict(width=96, layers=4, batch=64),
    "convnet": dict(width=8, layers=2, batch=16),
    "gpt": dict(width=32, layers=3, heads=4, seq_len=16, batch=16),
    "narrow mlp": dict(width=32, layers=4, batch=64),
    "deep mlp": dict(width=96, layers=8, batch=64),
}
FLOAT32 = PRECISIONS["float32"]


def settings(model: str) -> TrainConfig:
    return TrainConfig(model=model.split()[-1], steps=3, clip=0.0, device="cpu", **SMALL[model]).resolved()


def shape(config: TrainConfig) -> Shape:
    model: Any = build_model(config, load_data(config).info)
    return shape_of(config.model, model.config)


def held_bytes(config: TrainConfig, layout: Layout, precision: Precision) -> Held:
    """Return what the fullest rank holds by kind, counted in a run that has taken one step."""
    settings = config_of(config, layout, precision)

    def work() -> Held:
        job = Job(settings.resolved(), world())
        batches = job.loader.steps(2)
        batch = next(batches)
        job.forward_backward(batch)
        job.update(batch)
        found = fullest(job, next(batches))
        batches.close()  # type: ignore[attr-defined]
        return found

    return max(launch(work, layout.ranks), key=lambda held: held.total)


class OnHost(np.ndarray):
    """Stands for an array of the loader where the model is on a GPU."""

    def __array_ufunc__(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("computed with an array of the host")


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2, schedule="1f1b", microbatches=2)], ids=str)
def test_what_is_counted_runs_on_the_jobs_device(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipar.training.to_device", lambda x, device: np.array(x))
    config = config_of(settings("mlp"), layout, FLOAT32).resolved()

    def work() -> int:
        job = Job(config, world())
        (batch,) = job.loader.steps(1)
        batch = replace(batch, inputs=batch.inputs.view(OnHost), targets=batch.targets.view(OnHost))
        return fullest(job, batch).activations

    assert all(launch(work, layout.ranks))


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(dp=2, zero=1)], ids=str)
def test_a_model_with_batch_norm_is_counted_too(layout: Layout) -> None:
    """Though it cannot put off the sum of its gradients, as it takes no microbatches."""
    found = held_bytes(replace(settings("convnet"), norm="batch"), layout, FLOAT32)
    assert found.gradients >= found.optimizer / 2 > 0  # which are two moments, each as large


FP16 = on_the_wire(replace(PRECISIONS["fp16"], scores=4))  # as on a CPU, and as minipar sends
MEMORY_CASES = [
    *((model, layout, FLOAT32) for model in ("mlp", "convnet", "gpt") for layout in (
        Layout(), Layout(dp=2), Layout(dp=2, zero=1), Layout(recompute=True),
    )),
    *((model, layout, FLOAT32) for model in ("mlp", "gpt") for layout in (
        Layout(dp=2, zero=2), Layout(dp=2, zero=3), Layout(tp=2),
    )),
    ("gpt", Layout(tp=2, sequence_parallel=True), FLOAT32),
    ("gpt", Layout(microbatches=4), FLOAT32),
    ("gpt", Layout(pp=2, schedule="1f1b", microbatches=4), FLOAT32),
    ("gpt", Layout(pp=2, schedule="gpipe", microbatches=4, recompute=True), FLOAT32),
    ("mlp", Layout(dp=2, zero=3), FP16), ("gpt", Layout(dp=2, zero=1), FP16), ("gpt", Layout(recompute=True), FP16),
    ("convnet", Layout(), FP16),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layout", "precision"), MEMORY_CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_memory_is_what_a_run_holds(model: str, layout: Layout, precision: Precision) -> None:
    config = settings(model)
    stages = memory(shape(config), layout, config.batch or 0, precision)
    predicted = max(stages, key=lambda held: held.total)
    found = held_bytes(config, layout, precision)
    assert predicted.total == pytest.approx(found.total, rel=0.01)
    for kind in ("parameters", "gradients", "optimizer", "activations"):
        assert getattr(predicted, kind) == pytest.approx(getattr(found, kind), rel=0.02), kind


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
def test_pipeline_stages_hold_what_is_predicted(schedule: str) -> None:
    config = settings("gpt")
    layout = Layout(pp=2, schedule=schedule, microbatches=4)
    predicted = memory(shape(config), layout, config.batch or 0, FLOAT32)

    def work() -> tuple[float, float, int]:
        job = Job(config_of(config, layout).resolved(), world())
        assert isinstance(job.strategy, Pipelined)
        batch = next(job.loader.steps(1))
        job.forward_backward(batch)
        job.update(batch)
        now = held(job.strategy.stage, job.optimizer)
        return now.parameters, now.optimizer, job.strategy.executor.peak_live

    for stage, (parameters, optimizer, live) in enumerate(launch(work, 2)):
        assert predicted[stage].parameters == parameters
        assert predicted[stage].optimizer == pytest.approx(optimizer)
        assert layout.live(stage) == live


IN_FLOAT32 = [
    ("mlp", Layout(dp=2)), ("mlp", Layout(dp=2, zero=1)), ("mlp", Layout(dp=2, zero=2, microbatches=2)),
    ("mlp", Layout(dp=2, zero=3)), ("mlp", Layout(tp=2)), ("convnet", Layout(tp=2)), ("gpt", Layout(dp=4, zero=3)),
    ("gpt", Layout(tp=2)), ("gpt", Layout(tp=2, sequence_parallel=True)), ("gpt", Layout(tp=2, recompute=True)),
    ("gpt", Layout(pp=2, schedule="1f1b", microbatches=4)), ("gpt", Layout(pp=3, schedule="gpipe", microbatches=4)),
    ("gpt", Layout(pp=2, schedule="interleaved", microbatches=4, chunks=2)),
    ("mlp", Layout(pp=2, schedule="zb-h1", microbatches=4)),
    ("gpt", Layout(dp=2, pp=2, tp=2, schedule="1f1b", microbatches=4)),
    ("gpt", Layout(dp=2, pp=2, zero=1, schedule="1f1b", microbatches=4)),
    # Stages whose ends are unequal: narrow layers and wide ones, whole activations and parts, halved images.
    ("narrow mlp", Layout(pp=2, schedule="1f1b", microbatches=4)),
    ("deep mlp", Layout(pp=2, tp=2, schedule="1f1b", microbatches=4)),
    ("deep mlp", Layout(pp=4, tp=2, schedule="1f1b", microbatches=4)),
    ("convnet", Layout(pp=3, schedule="1f1b", microbatches=4)),
]
TRAFFIC_CASES = [
    *((model, layout, FLOAT32) for model, layout in IN_FLOAT32),
    ("gpt", Layout(pp=2, tp=2, schedule="1f1b", microbatches=4), FP16), ("convnet", Layout(tp=2), FP16),
    ("mlp", Layout(pp=2, tp=2, schedule="1f1b", microbatches=4), FP16),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layout", "precision"), TRAFFIC_CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_traffic_is_what_the_ledger_counts(model: str, layout: Layout, precision: Precision) -> None:
    config = settings(model)
    predicted = traffic(shape(config), layout, config.batch or 0, precision)

    def work() -> dict[str, float]:
        job = Job(config_of(config, layout, precision).resolved(), world())
        batches = job.loader.steps(2)
        batch = next(batches)
        job.forward_backward(batch)
        job.update(batch)
        job.comm.ledger.reset()
        batch = next(batches)
        job.forward_backward(batch)
        job.update(batch)
        batches.close()  # type: ignore[attr-defined]
        sent = dict.fromkeys(("dp", "pp", "tp"), 0.0)
        for row in job.comm.ledger.rows():
            axis = next((a for a in sent if f"/{a}" in row.group), None)
            if axis is not None and row.elements:
                sent[axis] += float(row.ring_elements) * row.bytes / row.elements
        return sent

    rows = launch(work, layout.ranks)
    for axis in ("dp", "pp", "tp"):
        found = max(row[axis] for row in rows)
        assert predicted[axis] == pytest.approx(found, rel=0.02, abs=200), axis


def test_what_is_held_is_counted_on_a_whole_batch() -> None:
    job = Job(TrainConfig(model="mlp", steps=3, batch=1000).resolved(), world())  # of 1438 samples
    next(job.train())
    assert next(job.loader.steps(1)).samples == 438 and whole_batch(job).samples == 1000
