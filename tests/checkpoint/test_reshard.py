"""A checkpoint loads on any layout, bitwise; a run resumed on the same layout goes on bitwise."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipar import launch, world
from minipar.comm.launcher import run_mpi
from minipar.parallel.placement import Layout, Shard
from minipar.parallel.region import Region, boxes_of_range, extents
from minipar.resume import resume, save_job
from tests.checkpoint.jobs import (
    LOSS_TOLERANCE,
    STEPS,
    assert_same,
    job,
    overflow_once,
    pass_on,
    saved_state,
    steps,
    train_and_save,
)

# (ranks, layout) from 8 to 4 to 2 to 1 to 3 and back; each kind of sharding meets another one
GPT_CHAIN: list[tuple[int, dict[str, Any]]] = [
    (8, {"tp": 2, "pp": 2, "zero": 1}),
    (4, {"zero": 3}),
    (4, {"tp": 4}),
    (4, {"pp": 4, "schedule": "1f1b"}),
    (2, {"partition": "cost"}),
    (2, {"pp": 2, "schedule": "interleaved", "chunks": 2, "microbatches": 4}),
    (1, {}),
    (3, {"partition": "count"}),
    (3, {"zero": 2}),
    (2, {"aggregation": "master"}),
    (4, {"tp": 2, "zero": 3, "sequence_parallel": True}),
    (8, {"tp": 8}),
    (8, {"tp": 2, "pp": 2, "zero": 1}),
]
MLP_CHAIN: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp": 2}),
    (3, {"zero": 1}),
    (2, {"partition": "bytes"}),
    (2, {"tp": 2}),
]
IMAGE_CHAIN: list[tuple[int, dict[str, Any]]] = [
    (3, {"zero": 3}),
    (1, {}),
    (2, {"partition": "cost"}),
    (3, {"zero": 3}),
]


BEFORE, AFTER = 3, 2  # steps until the checkpoint, which is at the end of an epoch, and steps after it

SGD = {"optimizer": "sgd", "momentum": 0.9, "dtype": "float64"}
ADAMW = {"optimizer": "adamw", "dtype": "float64"}
FP16 = {"optimizer": "adamw", "amp": "fp16"}
CHAINS: dict[str, tuple[str, list[tuple[int, dict[str, Any]]], dict[str, Any]]] = {
    "gpt, adamw": ("gpt", GPT_CHAIN, ADAMW),
    "gpt, sgd": ("gpt", GPT_CHAIN, SGD),
    "gpt, fp16": ("gpt", GPT_CHAIN[::2], FP16),  # NumPy is slow in float16; from 8 to 4, 2, 1, 3 and back as well
    "convnet, adamw": ("convnet", IMAGE_CHAIN, {"norm": "batch", **ADAMW}),
    "convnet, sgd": ("convnet", IMAGE_CHAIN, {"norm": "batch", **SGD}),
    "mlp, adamw": ("mlp", MLP_CHAIN, ADAMW),
    "mlp, sgd": ("mlp", MLP_CHAIN, SGD),
}


@pytest.mark.parametrize("case", CHAINS)
def test_through_many_layouts_and_back_bitwise(case: str, tmp_path: Path) -> None:
    """Every layout has the same state, bitwise, and the losses that follow from it are the serial run's."""
    kind, chain, settings = CHAINS[case]
    scaled = "amp" in settings
    prepare = overflow_once if scaled else None
    uncut = train_and_save(1, tmp_path / "serial", kind, BEFORE + AFTER, prepare, **settings)
    tolerance = LOSS_TOLERANCE["fp16" if scaled else "float64"]
    begun = train_and_save(chain[0][0], tmp_path / "0", kind, BEFORE, prepare, **chain[0][1], **settings)
    assert begun == pytest.approx(uncut[:BEFORE], rel=tolerance)
    first = saved_state(tmp_path / "0")
    kinds = {name.split()[0] for name in first[0]}
    moments = {"momentum_buffer"} if settings["optimizer"] == "sgd" else {"exp_avg", "exp_avg_sq"}
    assert kinds == {"parameter", *moments} | ({"buffer"} if kind == "convnet" else set())
    assert first[1]["step"] == BEFORE and (first[1]["loader"]["epoch"], first[1]["loader"]["index"]) == (1, 0)
    if scaled:  # a state that differs from a fresh scaler's in all that changes
        scaler = first[1]["scaler"]
        assert (scaler["scale"], scaler["_growth_tracker"], first[1]["skipped"]) == (2.0**15, BEFORE - 1, 1)
    for i, (ranks, layout) in enumerate(chain[1:], 1):
        losses = pass_on(ranks, tmp_path / str(i - 1), tmp_path / str(i), kind, AFTER, **layout, **settings)
        assert_same(first, saved_state(tmp_path / str(i)))
        assert losses == pytest.approx(uncut[BEFORE:], rel=tolerance), (ranks, layout)


RESUMED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "serial, adamw": (1, "gpt", {}),
    "data parallel, sgd with momentum": (3, "gpt", {"optimizer": "sgd", "momentum": 0.9}),
    "batch norm": (2, "convnet", {"norm": "batch"}),
    "ZeRO 3 and tp": (4, "gpt", {"zero": 3, "tp": 2}),
    "pipeline, tp and ZeRO 1": (8, "gpt", {"pp": 2, "tp": 2, "zero": 1}),
    "owners": (3, "mlp", {"partition": "count"}),
    "float16 with a loss scale": (2, "gpt", {"amp": "fp16", "zero": 2}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_on_the_same_layout_it_goes_on_bitwise(case: str, tmp_path: Path) -> None:
    ranks, kind, settings = RESUMED[case]

    def uncut() -> list[float]:
        made = job(world(), kind, **settings)
        losses = steps(made, STEPS)
        save_job(made, tmp_path / "uncut")
        return losses

    def cut() -> list[float]:
        made = job(world(), kind, **settings)
        losses = steps(made, 2)
        save_job(made, tmp_path / "cut")
        made = job(world(), kind, **settings)
        resume(made, tmp_path / "cut")
        assert made.steps_done == 2
        losses += steps(made, STEPS)
        save_job(made, tmp_path / "resumed")
        return losses

    assert launch(cut, ranks) == launch(uncut, ranks)
    assert_same(saved_state(tmp_path / "uncut"), saved_state(tmp_path / "resumed"))


def test_each_element_is_written_once_and_by_its_owner(tmp_path: Path) -> None:
    """Four ZeRO ranks write a quarter of everything each; of plain replicas one writes."""
    train_and_save(4, tmp_path / "zero", "gpt", 1, zero=1)
    train_and_save(4, tmp_path / "plain", "gpt", 1)
    serial = 3 * sum(p.data.nbytes for p in job(world()).model.parameters())
    sizes = [p.stat().st_size for p in (tmp_path / "zero" / "step-00000001").glob("shard-*")]
    assert len(sizes) == 4 and max(sizes) < 0.5 * serial
    assert len(list((tmp_path / "plain" / "step-00000001").glob("shard-*"))) == 1


@pytest.mark.mpi
def test_saved_under_mpi_and_loaded_on_threads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.save_once", str(tmp_path / "mpi")]
    assert run_mpi(command, 4, timeout=60) == 0
    pass_on(3, tmp_path / "mpi", tmp_path / "threads", "gpt", zero=2)
    assert_same(saved_state(tmp_path / "mpi"), saved_state(tmp_path / "threads"))
    train_and_save(4, tmp_path / "same", "gpt", 2, tp=2, zero=1)
    ours, theirs = saved_state(tmp_path / "same")[0], saved_state(tmp_path / "mpi")[0]
    for name, value in ours.items():
        assert np.allclose(value, theirs[name], rtol=1e-4, atol=1e-6), name


def test_boxes_of_a_range_are_its_elements_in_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(rng.integers(1, 5, rng.integers(0, 5)).tolist())
        array = np.arange(int(np.prod(shape))).reshape(shape)
        start, stop = sorted(rng.integers(0, array.size + 1, 2).tolist())
        boxes = boxes_of_range(shape, start, stop)
        parts = [array[tuple(slice(*side) for side in box)].reshape(-1) for box in boxes]
        assert np.array_equal(np.concatenate([np.empty(0, int), *parts]), np.arange(start, stop)), (shape, start, stop)
        assert len(boxes) <= max(2 * len(shape) - 1, 1)


@pytest.mark.parametrize("dim", (0, 1))
def test_a_flat_range_of_a_slice_with_groups_lies_where_it_should(dim: int) -> None:
    """ZeRO on top of a fused query-key-value weight that is cut by heads."""
    shape = (12, 5) if dim == 0 else (5, 12)
    serial = np.arange(60).reshape(shape)

    def program() -> None:
        layout = Layout(Shard(dim, groups=3), world())
        local = layout.local(serial).reshape(-1)
        for start, stop in ((0, local.size), (3, 17), (7, 8), (11, local.size)):
            region = Region(shape, layout, start=start)
            found = []
            for box, view in region.boxes(local[start:stop].copy()):
                assert view.shape == extents(box)
                assert np.array_equal(view, serial[tuple(slice(*side) for side in box)])
                found += view.reshape(-1).tolist()
            assert sorted(found) == sorted(local[start:stop].tolist())

    launch(program, 2)
