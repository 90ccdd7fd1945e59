"""What a distributed model prints, and where its first values come from, under every strategy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from minipar import Mesh, launch, world
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig, Model
from minipar.parallel.distribute import Recipe, distribute
from minipar.parallel.partition.policies import assign, items_of
from minipar.parallel.placement import describe
from minipar.parallel.region import slices, whole
from minipar.parallel.strategies.strategy import Strategy

SEED = 3


def mlp() -> Model:
    """Units of 112, 56 and 40 elements."""
    return MLP(MLPConfig(inputs=15, classes=5, width=7, layers=3))


def gpt(heads: int = 4, tied: bool = True) -> Model:
    return GPT(GPTConfig(11, 6, 12, 2, heads, 0.0, tied))


def convnet() -> Model:
    return ConvNet(ConvNetConfig(channels=2, size=6, classes=5, width=4, layers=2, groups=2))


def distributed(model: Model, axes: dict[str, int], policy: str | None = None, **recipe: Any) -> Strategy:
    """The model over the world in float64; with a policy, laid out by that."""
    if policy is not None:
        devices = axes.get("pp", 1) * axes.get("dp", 1)
        costs = [1.0] * len(model.blocks) if policy == "cost" else None
        recipe["assignment"] = assign(policy, items_of(model, "float64"), devices, costs)
    return distribute(model, Mesh(world(), **axes), Recipe(**recipe), seed=SEED, dtype="float64")


def printed(ranks: int, make: Any, axes: dict[str, int], **recipe: Any) -> list[dict[str, list[str]]]:
    """For each rank the printed table: {parameter: cells}, as the strategy and its model have it alike."""

    def run() -> dict[str, list[str]]:
        strategy = distributed(make(), axes, **recipe)
        assert str(strategy) == describe(strategy.model)
        rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in str(strategy).splitlines()]
        assert rows[-1] == ["total", f"{strategy.parameter_bytes():,}"]
        return {name: cells for name, *cells in rows}

    return launch(run, ranks)


PLAIN = ["placement", "global", "local", "bytes"]
STEPPED = ["placement", "global", "local", "stepped here", "bytes"]
FIRST, LAST = "layers.0.fc.weight", "layers.2.fc.bias"


def test_tensor_parallel() -> None:
    tables = printed(3, mlp, {"tp": 3})
    assert [t[FIRST] for t in tables] == [["Shard(0)", "(7, 15)", f"({n}, 15)", str(n * 120)] for n in (3, 2, 2)]
    assert tables[2]["layers.1.fc.weight"] == ["Shard(1)", "(7, 7)", "(7, 2)", "112"]
    assert tables[2]["layers.1.fc.bias"] == ["Replicate()", "(7,)", "(7,)", "56"]
    assert tables[0]["parameter"] == PLAIN


def test_replicas() -> None:
    tables = printed(2, mlp, {"dp": 2})
    assert tables[0] == tables[1] and tables[0][FIRST] == ["Replicate()", "(7, 15)", "(7, 15)", "840"]
    assert tables[0]["total"] == [f"{208 * 8:,}"]


def test_zero_3_in_float64() -> None:
    """The first unit's 112 elements over 3 ranks: 38, 38 and 36, of which the last 7 are the bias."""
    tables = printed(3, mlp, {"dp": 3}, zero=3)
    spans = [(0, 38), (38, 76), (76, 105)]
    assert [t[FIRST] for t in tables] == [
        [f"Flat({a}:{b})", "(7, 15)", f"({b - a},)", str(8 * (b - a))] for a, b in spans
    ]
    assert [t["layers.0.fc.bias"][0] for t in tables] == ["Flat(0:0)", "Flat(0:0)", "Flat(0:7)"]
    assert sum(int(t["total"][0].replace(",", "")) for t in tables) == 208 * 8
    assert tables[0]["parameter"] == PLAIN


@pytest.mark.parametrize("stage", (1, 2))
def test_zero_1_and_2_keep_whole_parameters_and_step_a_range(stage: int) -> None:
    tables = printed(3, mlp, {"dp": 3}, zero=stage)
    assert tables[1][FIRST] == ["Replicate()", "(7, 15)", "(7, 15)", "Flat(38:76)", "840"]
    assert tables[0]["parameter"] == STEPPED and tables[0]["total"] == [f"{208 * 8:,}"]


def test_zero_3_of_what_tensor_parallelism_leaves() -> None:
    tables = printed(4, mlp, {"dp": 2, "tp": 2}, zero=3)
    # Rank 2 is second in dp and first in tp, which has 4 of the 7 rows: 60 + 4 elements in the unit, half of it.
    assert tables[2][FIRST] == ["Shard(0) Flat(32:60)", "(7, 15)", "(28,)", "224"]
    assert tables[2]["layers.1.fc.bias"][0].startswith("Replicate() Flat(")


def test_layers() -> None:
    tables = printed(3, gpt, {"pp": 3}, policy="cost")
    tied = ["Stage(0, 2)", "(11, 12)", "(11, 12)", "1,056"]  # the embedding, and its copy at the output
    assert [t["wte.weight"] for t in tables] == [tied, ["Stage(0, 2)", "(11, 12)", "-", "0"], tied]
    assert tables[1]["ln_f.bias"] == ["Stage(2)", "(12,)", "-", "0"]
    assert tables[2]["ln_f.bias"] == ["Stage(2)", "(12,)", "(12,)", "96"]


def test_a_pipeline_of_tensor_parallel_stages() -> None:
    tables = printed(4, gpt, {"pp": 2, "tp": 2}, microbatches=2)
    name = "h.1.attn.c_attn.weight"
    here = ["Stage(1) Shard(0, groups=3)", "(36, 12)", "(18, 12)", "1,728"]
    assert [t[name] for t in tables] == [[*here[:2], "-", "0"]] * 2 + [here] * 2
    assert tables[3]["ln_f.bias"] == ["Stage(1) Replicate()", "(12,)", "(12,)", "96"]
    assert tables[0]["wte.weight"][:3] == ["Stage(0, 1) Shard(0)", "(11, 12)", "(6, 12)"]


def test_a_pipeline_of_sharded_optimizers() -> None:
    tables = printed(4, mlp, {"pp": 2, "dp": 2}, zero=1, microbatches=2)
    # Rank 1 runs stage 1 of the first replica: it has nothing of the first block.
    assert tables[1][FIRST] == ["Stage(0) Replicate()", "(7, 15)", "-", "-", "0"]
    assert tables[0][FIRST] == ["Stage(0) Replicate()", "(7, 15)", "(7, 15)", "Flat(0:56)", "840"]


def test_owners() -> None:
    """An owner has a copy of its part beside the whole parameter that every rank computes with."""
    tables = printed(3, mlp, {"dp": 3}, policy="count")  # 70, 69 and 69 of 208 elements
    assert [t[FIRST] for t in tables] == [
        ["Replicate()", "(7, 15)", "(7, 15)", steps, f"{840 + 8 * n:,}"]
        for steps, n in (("Flat(0:70)", 70), ("Flat(70:105)", 35), ("nothing", 0))
    ]
    assert tables[2][LAST] == ["Replicate()", "(5,)", "(5,)", "all", "80"]
    rows = printed(2, mlp, {"dp": 2}, policy="kind")[1][FIRST]
    assert rows == ["Replicate()", "(7, 15)", "(7, 15)", "[4:7]", f"{840 + 3 * 15 * 8:,}"]


# The first values ----------------------------------------------------------------------------------------

STARTS: dict[str, tuple[int, Any, dict[str, int], dict[str, Any]]] = {
    "tp 3": (3, lambda: gpt(3), {"tp": 3}, {}),
    "tp 3, untied, sequence": (3, lambda: gpt(3, tied=False), {"tp": 3}, {"sequence_parallel": True}),
    "tp 4": (4, gpt, {"tp": 4}, {}),
    "tp 4, mlp": (4, mlp, {"tp": 4}, {}),
    "output channels": (3, convnet, {"tp": 3}, {"convolution": "output"}),
    "input channels": (3, convnet, {"tp": 3}, {"convolution": "input"}),
    "image region": (4, convnet, {"tp": 4}, {"convolution": "region"}),
    "ZeRO 3": (3, gpt, {"dp": 3}, {"zero": 3}),
    **{f"ZeRO {s} × tp 2": (4, gpt, {"dp": 2, "tp": 2}, {"zero": s}) for s in (1, 2, 3)},
    "ZeRO 3 × input channels": (4, convnet, {"dp": 2, "tp": 2}, {"zero": 3, "convolution": "input"}),
    "pp 2 × tp 2": (4, gpt, {"pp": 2, "tp": 2}, {"microbatches": 2}),
    "layers": (3, gpt, {"pp": 3}, {"policy": "cost"}),
    "owners": (3, gpt, {"dp": 3}, {"policy": "count"}),
}


def boxes_held(strategy: Strategy) -> Iterator[tuple[str, tuple[slice, ...], np.ndarray]]:
    """(name, where in the serial tensor, values) of what this rank holds of its parameters and steps."""
    for held in strategy.parameters_held():
        for box, values in held.region.boxes(held.tensor.data):
            yield held.name, slices(box, whole(held.region.shape)), values


@pytest.mark.parametrize("name", STARTS)
def test_the_first_values_are_the_serial_ones_bitwise(name: str) -> None:
    """Every element that a rank holds is that of the serial initialisation, and some rank holds it."""
    ranks, make, axes, options = STARTS[name]
    serial = {n: p.data for n, p in make().materialize(SEED, "float64").named_parameters()}

    def run() -> list[tuple[str, tuple[slice, ...], np.ndarray]]:
        strategy = distributed(make(), axes, **options)
        for n, p in strategy.model.named_parameters():  # what it computes with, where that is here
            if p.is_materialized:
                part = serial[n] if p.layout is None else p.layout.local(serial[n])
                assert p.data.shape == part.shape and p.data.tobytes() == part.tobytes(), n
        return list(boxes_held(strategy))

    seen = {n: np.zeros(p.shape, bool) for n, p in serial.items()}
    for found in launch(run, ranks):
        for n, index, values in found:
            assert values.dtype == np.float64
            assert np.ascontiguousarray(values).tobytes() == serial[n][index].tobytes(), n
            seen[n][index] = True
    assert all(marks.all() for marks in seen.values())
