"""Where a step waits for the GPU, counted without one: on NumPy arrays that pass for CuPy's."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minipar
from minipar.backend import summand
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.nn import Linear
from minipar.optim import squared_norm
from minipar.parallel.norms import global_norm
from minipar.parallel.pipeline import executor as executor_module
from minipar.parallel.pipeline.executor import Executor
from minipar.parallel.pipeline.schedules import build_schedule
from minipar.parallel.pipeline.stage import Stage
from minipar.trace import Trace, recording
from minipar.training import Job, load_data

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Array(np.ndarray):
    """Passes for a CuPy array: what is read from it is read by the same methods."""

    def get(self) -> np.ndarray:
        Stream().synchronize()
        return np.asarray(self)

    def item(self) -> Any:
        return self.get().item()

    def __float__(self) -> float:
        return float(self.get())

    def sum(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return np.asarray(np.asarray(self).sum(*args, **kwargs)).view(Array)

    def dot(self, other: Any) -> Any:  # type: ignore[override]
        return (self * other).sum()


class BaseStream:
    def synchronize(self) -> None: ...


class Stream(BaseStream):
    """Has its method from above, as CuPy's has."""


class Event:
    def synchronize(self) -> None: ...


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = types.ModuleType("cupy")
    module.ndarray = Array  # type: ignore[attr-defined]
    module.stack = lambda arrays: np.stack(arrays).view(Array)  # type: ignore[attr-defined]
    module.dot = lambda a, b: a.dot(b)  # type: ignore[attr-defined]
    module.cuda = types.SimpleNamespace(Stream=Stream, Event=Event)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_waits_are_counted_once_and_the_classes_put_back(cupy: Any) -> None:
    from waits import Waits

    before = {kind: dict(vars(kind)) for kind in (Array, Stream, BaseStream, Event)}
    x = np.ones(()).view(Array)
    with Waits(cupy) as waits:
        float(x)
        x.item()
        x.item()
        Stream().synchronize()
        Event().synchronize()
        _ = x + 1
    assert dict(waits.counts) == {"__float__": 1, "item": 2, "synchronize": 2} and waits.total == 5
    assert str(waits) == "__float__ 1, item 2, synchronize 2" and str(Waits(cupy)) == "none"
    assert {kind: dict(vars(kind)) for kind in before} == before
    x.item()
    assert waits.total == 5


def norm_of_parameters(layers: list[Linear]) -> float:
    return global_norm((p, p) for layer in layers for p in layer.parameters())


def norm_of_gradients(layers: list[Linear]) -> float:
    return squared_norm(p.grad for layer in layers for p in layer.parameters()) ** 0.5


@pytest.mark.parametrize("norm", (norm_of_parameters, norm_of_gradients))
def test_a_norm_over_many_tensors_waits_once(cupy: Any, norm: Callable[[list[Linear]], float]) -> None:
    from waits import Waits

    layers = [Linear(3, 4).materialize(seed=i) for i in range(5)]
    for i, p in enumerate(p for layer in layers for p in layer.parameters()):
        p.grad = np.full(p.shape, i, np.float32)
    want = norm(layers)
    for layer in layers:
        for p in layer.parameters():
            p.grad = p.grad.view(Array)
    with Waits(cupy) as waits:
        found = norm(layers)
    assert found == pytest.approx(want, rel=1e-12) and waits.total == 1


def test_losses_of_pieces_add_up_in_float64_and_are_read_at_the_end(cupy: Any) -> None:
    from waits import Waits

    losses = [np.array(x, np.float32).view(Array) for x in (0.1, 2.0, 3e-7)]
    total: Any = 0.0
    with Waits(cupy) as waits:
        for loss in losses:
            total = total + summand(loss)
        assert waits.total == 0 and total.dtype == np.float64
        assert float(total) == sum(float(np.float32(x)) for x in (0.1, 2.0, 3e-7))
    assert waits.total == 1
    assert type(summand(np.ones(()))) is float


def test_a_pipeline_waits_after_its_actions_only_where_they_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(executor_module, "synchronize", waited.append)
    config = TrainConfig(model="mlp", steps=1, batch=4, device="cpu").resolved(VERIFY_DEFAULTS)
    job = Job(config, minipar.world(), load_data(config))
    pp = minipar.world()
    stage = Stage(job.model, pp, [range(len(list(job.model.blocks)))])
    executor, batch = Executor(stage, job.model, pp, build_schedule("gpipe", 1, 2)), next(iter(job.loader))
    executor.run(batch.split(2), batch.count)
    assert not waited
    with recording(Trace()):
        executor.run(batch.split(2), batch.count)
    assert len(waited) == 4  # F and B of two microbatches
