"""Sequence parallelism equals serial training, also for lengths shorter than the ranks or undivided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minipar import Tensor, launch, world
from minipar.nn import LayerNorm, Module
from minipar.parallel.tensor_parallel.parallelize import SequenceLength, parallelize
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.parallel.tensor_parallel.styles import EnterAfter, PartialGradients, SequenceScatter
from minipar.tape import no_grad
from tests.parallel.tensor_runs import LENGTHS, MODELS, SEED, batch, equals_serial, loss_of, serial

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("gpt-tied", 2, {}),
    ("gpt-tied", 4, {"clip": 0.1}),
    ("gpt-untied", 4, {"pieces": 2}),
    ("gpt-3-heads", 3, {"recomputed": True}),
]


@pytest.mark.parametrize(("kind", "ranks", "options"), CASES)
def test_equals_serial(kind: str, ranks: int, options: dict[str, Any]) -> None:
    assert min(LENGTHS) < 2 and max(LENGTHS) % 3
    serial(kind, clip=options.get("clip", 0.0))
    launch(lambda: equals_serial(world(), kind, sequence_parallel=True, **options), ranks, timeout=30)


class Normed(Module):
    """What lies between two regions."""

    def __init__(self, width: int):
        self.enter, self.norm = Module(), LayerNorm(width)
        self.enter.forward = lambda x: x  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.enter(x))


@pytest.mark.parametrize("length", [1, 3, 7, 8])
def test_layer_norm_gradients_are_summed_over_the_sequence(length: int) -> None:
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, length, 6)), rng.standard_normal((2, length, 6))

    def run(parallel: bool) -> list[np.ndarray]:
        model, sequence = Normed(6), SequenceLength()
        if parallel:
            norm = (PartialGradients(), EnterAfter(sequence))
            parallelize(model, world(), {"enter": SequenceScatter(sequence), "norm": norm})
        model.materialize(0, "float64")
        leaf = Tensor(x, requires_grad=True)
        y = model(leaf)
        # After EnterAfter each rank goes its own way, so its share of the gradient is its own.
        y.backward(g / world().size if parallel else g)
        return [y.data, leaf.grad, model.norm.weight.grad, model.norm.bias.grad]

    expected = run(False)
    for ranks in (2, 3, 5):
        for found in launch(run, ranks, True):
            for a, b in zip(found, expected):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_a_part_is_all_that_lies_between_regions() -> None:
    def run() -> list[tuple[int, ...]]:
        model, seen = MODELS["gpt-tied"](), []
        parallelize(model, world(), default_plan(model, sequence_parallel=True)).materialize(0)
        norm = model.h[1].ln_2
        forward = norm.forward
        norm.forward = lambda x: (seen.append(x.shape), forward(x))[1]
        model(np.zeros((3, 7), int))
        return seen

    assert launch(run, 4) == [[(3, 2, 60)], [(3, 2, 60)], [(3, 2, 60)], [(3, 1, 60)]]


def test_ranks_at_different_steps_do_not_see_each_other_s_length() -> None:
    """One plan object for all ranks, and forwards of several lengths before their backwards."""
    expected = MODELS["gpt-3-heads"]().materialize(SEED, "float64")
    shared = default_plan(expected, sequence_parallel=True)
    for step in range(3):
        loss_of(expected, *batch("gpt-3-heads", step)).backward()

    def run() -> None:
        model = MODELS["gpt-3-heads"]()
        parallelize(model, world(), shared).materialize(SEED, "float64")
        losses = [loss_of(model, *batch("gpt-3-heads", step), recomputed=True) for step in range(3)]
        with no_grad():
            loss_of(model, *batch("gpt-3-heads", 3))
        for loss in losses:
            loss.backward()
        for (name, p), q in zip(model.named_parameters(), expected.parameters()):
            part = q.grad if p.layout is None else p.layout.local(q.grad)
            scale = max(np.abs(q.grad).max(), 1e-3)
            assert np.abs(p.grad - part).max() <= 1e-10 * scale, name

    launch(run, 3, timeout=20)
