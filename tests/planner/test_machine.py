"""Machine files: written and read back, refused by the name of what they lack; presets; interpolation; fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipar import launch, world
from minipar.commands.calibrate import calibrate_command, report
from minipar.errors import DataError, UsageError
from minipar.models import ConvNetConfig, GPTConfig, MLPConfig
from minipar.planner import calibrate as calibration
from minipar.planner.calibrate import fit_line, measure_collective, measure_overlap
from minipar.planner.collectives import SYMMETRIC
from minipar.planner.fit import fitted, with_rates
from minipar.planner.layout import Layout
from minipar.planner.machine import Machine, Measured, Table, read_machine, write_machine
from minipar.planner.measure_ops import Kind, kinds, measure_kind, measure_updates
from minipar.planner.presets import GPUS, NETWORKS, preset
from minipar.planner.run_layouts import Ran, Runs, middle
from minipar.planner.shapes import shape_of
from minipar.planner.step_time import predict
from tests.planner.machines import FLAT, MEASURED, PLAIN


@pytest.mark.parametrize("machine", [PLAIN, MEASURED, preset("h100-80gb")], ids=lambda m: m.name)
def test_a_machine_is_read_back_as_it_was_written(machine, tmp_path: Path) -> None:
    write_machine(machine, tmp_path / "machine.json")
    assert read_machine(tmp_path / "machine.json") == machine


def _broken(tmp_path: Path, *keys: str, machine: Machine = PLAIN) -> Path:
    path = tmp_path / "machine.json"
    write_machine(machine, path)
    found = json.loads(path.read_text())
    for key in keys:
        *parents, last = key.split(".")
        place = found
        for parent in parents:
            place = place[parent]
        del place[last]
    path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize(
    "keys", [("memory",), ("bandwidth", "node.alpha", "cluster.beta"), ("matmul.float16.peak",), ("matmul",)]
)
def test_every_missing_key_is_named(keys: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_machine(_broken(tmp_path, *keys))
    for key in keys:
        assert key in str(error.value)
    assert "minipar calibrate" in str(error.value)


def test_every_missing_key_of_what_was_measured_is_named(tmp_path: Path) -> None:
    keys = ("measured.step", "measured.reference", "measured.ops.gelu.backward", "memory")
    with pytest.raises(DataError) as error:
        read_machine(_broken(tmp_path, *keys, machine=MEASURED))
    assert all(key in str(error.value) for key in keys)


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    path = _broken(tmp_path)
    path.write_text(path.read_text().replace("minipar machine 1", "minipar machine 9"))
    with pytest.raises(DataError, match=r"'minipar machine 9', this minipar reads 'minipar machine 1'"):
        read_machine(path)
    assert read_machine(_broken(tmp_path, "format")) == PLAIN  # as written by hand


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(ops={"gelu": Table(((1.0, 2.0),), [0.0, 1e-3], [1e-3, 1e-3])}), "measured.ops.gelu.forward = 0"),
        (dict(ops={"gelu": Table(((1.0, 2.0),), [1e-3], [1e-3])}), "of shape"),
        (dict(ops={"gelu": Table(((2.0, 1.0),), [1e-3, 1e-3], [1e-3, 1e-3])}), "do not increase"),
        (dict(fits={"send": {2: (-1e-6, 0.0)}}), "measured.fits.send.2 = -1e-06"),
        (dict(samples={"send": {2: [(8.0, 0.0)]}}), "measured.samples.send.2"),
        (dict(step=-1.0, context={"gpt": 0.0}), "measured.step = -1, measured.context.gpt = 0"),
        (dict(reference={"gpt": -2.0}), "measured.reference.gpt = -2"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_measurements_that_cannot_be_are_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    assert MEASURED.measured is not None
    write_machine(replace(MEASURED, measured=replace(MEASURED.measured, **change)), tmp_path / "machine.json")
    with pytest.raises(DataError, match=re.escape(named)):
        read_machine(tmp_path / "machine.json")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("memory", -1, "memory = -1"), ("matmul", {"float32": {"peak": 1e12, "efficiency": 0}}, "efficiency = 0"),
     ("node_ranks", 0, "node_ranks = 0"), ("overhead", -1, "overhead = -1"),
     ("memory", "much", "much")],
)  # fmt: skip
def test_values_that_cannot_be_are_named(key: str, value: object, named: str, tmp_path: Path) -> None:
    path = _broken(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DataError, match=named):
        read_machine(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="minipar calibrate"):
        read_machine(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        read_machine(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="must be an object"):
        read_machine(tmp_path / "list.json")


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("network", [None, *NETWORKS])
def test_presets_are_machines(gpu: str, network: str | None) -> None:
    machine = preset(gpu, network)
    assert machine.source and machine.node.beta < machine.cluster.beta * 10
    for rate in machine.matmul.values():
        assert 0 < rate.efficiency < 1 and rate.peak > 1e12


def test_unknown_presets_name_those_there_are() -> None:
    with pytest.raises(UsageError, match="a100-80gb"):
        preset("abacus")
    with pytest.raises(UsageError, match="infiniband-hdr"):
        preset("a100-80gb", "pigeons")


def test_tables_interpolate_logarithms_and_go_on_above_but_not_below() -> None:
    assert FLAT.seconds((10.0,), "forward") == pytest.approx(1e-2)
    assert FLAT.seconds((10.0,), "backward") == pytest.approx(2e-2)
    assert FLAT.seconds((10_000.0,), "forward") == pytest.approx(10.0)
    assert FLAT.seconds((0.01,), "forward") == pytest.approx(1e-3)


def test_measured_collectives_pass_through_their_points() -> None:
    assert MEASURED.measured is not None
    assert MEASURED.measured.collective("all_reduce", 100.0, 2) == pytest.approx(1e-2)
    assert MEASURED.measured.collective("all_reduce", 10.0, 2) == pytest.approx(10**-2.5)
    assert MEASURED.measured.collective("all_reduce", 1000.0, 2) == pytest.approx(0.1)
    assert MEASURED.measured.collective("all_reduce", 0.5, 2) == pytest.approx(1e-3)  # as the smallest
    assert MEASURED.measured.collective("all_reduce", 1.0, 4) is None


def test_the_fit_finds_alpha_and_beta_and_says_how_far_off_it_is() -> None:
    alpha, beta, error = fit_line([(n, 2e-6 + 3e-10 * n) for n in (8, 1e3, 1e5, 1e7)])
    assert (alpha, beta) == pytest.approx((2e-6, 3e-10))
    assert error < 1e-9
    _, _, error = fit_line([(1, 1.0), (2, 3.0), (3, 2.0)])
    assert 0.1 < error < 1.0


def test_a_machine_is_found_again_from_two_runs() -> None:
    truth = with_rates(PLAIN, "float32", 0.4, 5e11)

    def run(machine, flops: float, moved: float) -> float:
        rate = machine.rate("float32")
        return flops / (rate.peak * rate.efficiency) + moved / machine.bandwidth

    seen = [(lambda m, a=a: run(m, *a), run(truth, *a)) for a in ((1e12, 1e10), (1e10, 1e12))]
    found = fitted(PLAIN, "float32", seen)
    assert found.rate("float32").efficiency == pytest.approx(0.4, rel=1e-3)
    assert found.bandwidth == pytest.approx(5e11, rel=1e-3)
    with pytest.raises(ValueError, match="two"):
        fitted(PLAIN, "float32", seen[:1])


def test_collectives_are_measured_alike_on_all_ranks() -> None:
    def work() -> tuple[list[list[tuple[float, float]]], float]:
        comm = world()
        return [measure_collective(comm, name, (8, 1024)) for name in calibration.OPERATIONS], measure_overlap(comm)

    first, second = launch(work, 2)
    assert first == second
    for points in first[0]:
        assert [n for n, _ in points] == [8 if n < 1000 else 1024 for n, _ in points] or points[0][0] in (8, 16)
        assert all(seconds > 0 for _, seconds in points)
    assert 0 <= first[1] <= 1


def test_operations_are_measured_forward_and_backward() -> None:
    comm = world()
    every = kinds("float32")
    for name, kind in every.items():
        smallest = tuple((axis[0],) for axis in kind.axes)
        table = measure_kind(Kind(smallest, kind.make, kind.flops, kind.bytes), comm)
        assert np.ravel(table.forward)[0] > 0 and np.ravel(table.backward)[0] > 0, name
    assert set(measure_updates(comm, "float32")) == {"adamw", "clip", "accumulate"}


def test_what_is_too_large_is_extrapolated_by_its_work() -> None:
    kind = kinds("float32")["linear"]
    small = Kind(((64,), (64,), (64, 10**6)), kind.make, kind.flops, kind.bytes)
    table = measure_kind(small, world())
    first, second = table.forward[0][0]
    assert second / first == pytest.approx(10**6 / 64)


def test_every_operation_of_the_models_is_measured() -> None:
    measured = set(kinds("float32"))
    configs = {"gpt": GPTConfig(96, 16, 32, 2, 4), "mlp": MLPConfig(), "convnet": ConvNetConfig(1, 8, 10, 8, 3)}
    for model, config in configs.items():
        used = {op.kind for block in shape_of(model, config).blocks(2) for op in block.ops}
        assert used <= measured, used - measured


def test_calibration_gives_every_rank_the_same_machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = kinds("float32")
    small = {
        name: Kind(tuple(axis[:2] for axis in every[name].axes), every[name].make, every[name].flops)
        for name in ("linear", "add")
    }
    monkeypatch.setattr(calibration, "kinds", lambda dtype: small)
    monkeypatch.setattr(calibration, "SIZES", (8, 4096))

    def known(comm: object, machine: Machine, dtype: str) -> Measured:
        return replace(machine.measured, step=1e-4, context={"gpt": 1.1}, reference={"gpt": 0.1})

    monkeypatch.setattr(calibration, "measure_steps", known)
    said: list[str] = []
    first, second = launch(lambda: calibration.calibrate(world(), "float32", said.append), 2)
    assert first == second
    assert first.node_ranks == 2 and first.matmul["float32"].peak > 1e6
    assert set(first.measured.fits) == {*calibration.OPERATIONS} - {SYMMETRIC}  # threads have no such memory
    assert (first.measured.step, first.measured.context) == (1e-4, {"gpt": 1.1})
    assert "operation linear" in said
    write_machine(first, tmp_path / "machine.json")
    assert read_machine(tmp_path / "machine.json") == first
    report(first, 2)


def test_what_single_operations_do_not_tell_is_measured_in_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUILDS": 2, "TURNS": 1, "TURN": 0.0}.items():
        monkeypatch.setattr(calibration, name, value)
    found = launch(lambda: calibration.measure_steps(world(), MEASURED, "float32"), 2)
    assert found[0] == found[1] != MEASURED.measured
    assert found[0].step >= 0 and set(found[0].context) == set(found[0].reference) == {"mlp", "convnet", "gpt"}
    assert all(x >= 0.5 for x in found[0].context.values()) and all(x > 0 for x in found[0].reference.values())


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(pp=2, schedule="1f1b", microbatches=4)], ids=str)
@pytest.mark.parametrize("machine", [PLAIN, MEASURED], ids=["data sheet", "measured"])
def test_at_half_the_pace_a_step_takes_twice_as_long(machine: Machine, layout: Layout) -> None:
    shape = shape_of("gpt", GPTConfig(96, 16, 32, 2, 4))
    once, twice = (predict(shape, m, layout, 8).seconds for m in (machine, machine.paced(2.0)))
    assert twice == pytest.approx(2 * once, rel=1e-9)


def test_of_several_jobs_the_middle_counts() -> None:
    jobs = [
        Runs([Ran(a, held=1.0, disturbed=d), Ran(b, held=2.0)], reference=c, disturbed=d)
        for a, b, c, d in ((0.1, 9.0, 3.0, 0.0), (0.3, 7.0, 1.0, 0.5), (0.2, 8.0, 2.0, 0.1))
    ]
    found = middle(jobs)
    assert [ran.seconds for ran in found.layouts] == [0.2, 8.0] and found.reference == 2.0
    assert [ran.disturbed for ran in found.layouts] == [0.5, 0.0] and found.disturbed == 0.5
    assert [ran.held for ran in found.layouts] == [1.0, 2.0]


def test_the_pace_of_an_imitated_network_stays() -> None:
    slow = MEASURED.slowed(1e-3, 1e-8)
    assert slow.paced(3.0).wire == slow.wire
    runs = Runs([], reference=0.3, disturbed=0.0)
    machine = replace(MEASURED, measured=replace(MEASURED.measured, reference={"gpt": 0.1}))
    assert runs.pace(machine, "gpt") == pytest.approx(3.0)
    assert runs.pace(machine.paced(3.0), "gpt") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [(dict(dtype="int8"), "float64"), (dict(out=Path("nowhere/m.json")), "nowhere"), (dict(ranks=0), "at least 1")],
)
def test_calibrate_refuses_what_it_cannot(given: dict, told: str) -> None:
    arguments = {"ranks": None, "out": Path("m.json"), "png": None, "dtype": "float32"} | given
    with pytest.raises(UsageError, match=told):
        calibrate_command(**arguments)
