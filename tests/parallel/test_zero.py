"""ZeRO equals serial training: values, traffic, unused parameters, recomputation, and what it refuses."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipar import Tensor, launch, nn, no_grad, optim, world
from minipar.comm.launcher import find_mpirun, is_open_mpi, job_environment
from minipar.errors import UsageError
from minipar.mesh import Mesh
from minipar.models import MLP, MLPConfig, Model
from minipar.parallel.tensor_parallel.parallelize import parallelize
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.parallel.zero.flat_shards import FlatUnit
from minipar.parallel.zero.zero import Zero
from minipar.recompute import recompute
from minipar.tape import run_deferred
from tests.parallel.training_runs import SEED, assert_equal_steps, assert_replicas_bitwise
from tests.parallel.zero_runs import (
    OPTIMIZERS,
    data,
    loss_of,
    make,
    microbatches,
    norms_of,
    on_threads,
    serial,
    train,
    train_branching,
    train_over_cut_model,
)

STAGES = (1, 2, 3)

# --- Equal to serial --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
@pytest.mark.parametrize("kind", ("uneven", "mlp", "convnet", "gpt-tied", "gpt-untied"))
def test_equals_serial(kind: str, ranks: int, stage: int) -> None:
    k = 3 if ranks == 3 else 1
    of_ranks = on_threads(ranks, kind, stage, "momentum", k=k)
    assert_replicas_bitwise(of_ranks)
    assert_equal_steps(of_ranks[0], serial(kind, "momentum"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_accumulation_and_clipping(optimizer: str, stage: int) -> None:
    expected = serial("uneven", optimizer, clip=0.3)
    assert min(norms_of(expected)) > 0.3, "clipping must have something to do"
    for k in (1, 3):
        assert_equal_steps(on_threads(2, "uneven", stage, optimizer, k=k, clip=0.3)[1], expected)


@pytest.mark.parametrize("stage", STAGES)
def test_a_materialised_model_starts_from_rank_0_and_batch_norm_sees_the_whole_batch(stage: int) -> None:
    of_ranks = on_threads(3, "convnet-batch-norm", stage, materialized=True)
    assert_replicas_bitwise(of_ranks)
    assert_equal_steps(of_ranks[0], serial("convnet-batch-norm"))


@pytest.mark.parametrize("stage", STAGES)
def test_adamw_takes_bitwise_the_serial_step_from_identical_gradients(stage: int) -> None:
    rng = np.random.default_rng(0)
    model = make("gpt-tied").materialize(SEED, "float32")
    grads = [
        {name: rng.standard_normal(p.shape).astype(np.float32) for name, p in model.named_parameters()}
        for _ in range(3)
    ]
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    for step in grads:
        for name, p in model.named_parameters():
            p.grad = step[name]
        optimizer.step()

    def run() -> dict[str, np.ndarray]:
        zero = Zero(make("gpt-tied"), world(), stage).materialize(SEED, "float32")
        update = optim.AdamW([t for _, t in zero.shards()], lr=0.01)
        for step in grads:
            for unit in zero.units:
                for piece in unit.pieces:
                    flat = step[piece.param.name].reshape(-1)
                    piece.tensor.grad = flat[piece.start : piece.start + piece.tensor.size].copy()
            zero.step(update)
        return zero.full()

    expected = model.state_dict()
    for state in launch(run, 3):
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert value.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("stage", STAGES)
def test_initialisation_is_bitwise_the_serial_one_and_sends_nothing(stage: int) -> None:
    expected = make("gpt-tied").materialize(5, "float32").state_dict()

    def run() -> tuple[dict[str, np.ndarray], int]:
        comm = world()
        zero = Zero(make("gpt-tied"), comm, stage)
        comm.ledger.reset()
        zero.materialize(5, "float32")
        return zero.full() if comm.ledger.calls() == 0 else {}, zero.units[0].count

    for state, _ in launch(run, 3):
        assert {name: value.tobytes() for name, value in state.items()} == {
            name: value.tobytes() for name, value in expected.items()
        }


def test_each_element_belongs_to_exactly_one_rank() -> None:
    def run() -> list[tuple[str, int, int]]:
        zero = Zero(make("uneven"), world(), 3).materialize(1)
        return [(p.param.name, p.start, p.start + p.tensor.size) for u in zero.units for p in u.pieces]

    spans: dict[str, list[tuple[int, int]]] = {}
    for of_rank in launch(run, 4):
        for name, start, stop in of_rank:
            spans.setdefault(name, []).append((start, stop))
    for name, p in make("uneven").named_parameters():
        at = 0
        for start, stop in sorted(spans[name]):
            assert start == at and stop > start, name
            at = stop
        assert at == np.prod(p.global_shape), name


@pytest.mark.parametrize("sequence_parallel", (False, True))
@pytest.mark.parametrize("stage", (0, *STAGES))
def test_over_a_tensor_parallel_model(stage: int, sequence_parallel: bool) -> None:
    """tp 2 × dp 2: what a rank holds of a cut weight is cut again; all is the serial run's, clipping too."""
    clip = 0.3
    expected = serial("gpt-tied", clip=clip, steps=2)
    norms = norms_of(expected)
    assert min(norms) > clip, "clipping must have something to do"
    launch(lambda: train_over_cut_model(world(), stage, sequence_parallel, clip, expected, norms), 4, timeout=30)


@pytest.mark.mpi
def test_equals_serial_on_mpi() -> None:
    """Four processes; what `zero_mpi` does, on each of them."""
    program = find_mpirun()
    settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MINIPAR_TIMEOUT": "30"}
    job = subprocess.run(
        [program, "-n", "4", sys.executable, str(Path(__file__).parent / "zero_mpi.py")],
        env=job_environment(4, is_open_mpi(program), settings),
        capture_output=True,
        text=True,
        timeout=100,
        start_new_session=True,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("equal") == 4  # the ranks share one output, so lines may run together


# --- Traffic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", (1, 3))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ("uneven", "gpt-tied"))
def test_traffic_is_the_formula(kind: str, stage: int, k: int) -> None:
    """2Ψ, (k+1)Ψ, 3kΨ times (N-1)/N, Ψ padded; and one byte a parameter for each synchronising backward."""
    ranks = 3

    def run() -> None:
        comm = world()
        zero = Zero(make(kind), comm, stage).materialize(SEED, "float64")
        update = OPTIMIZERS["adamw"]([t for _, t in zero.shards()])
        psi = sum(math.prod(p.global_shape) for p in zero.model.parameters())
        padded = sum(unit.padded for unit in zero.units)
        assert psi <= padded < psi + ranks * len(zero.units)
        for step, (inputs, targets) in enumerate(data(kind, 2)):
            zero.zero_grad()
            comm.ledger.reset()
            microbatches(zero, inputs, targets, step, k, comm.rank, comm.size)
            zero.step(update)
            ledger = comm.ledger
            passes = {1: 2, 2: k + 1, 3: 3 * k}[stage]
            moved = ledger.ring_elements("reduce_scatter") + ledger.ring_elements("all_gather")
            assert moved == passes * padded * Fraction(ranks - 1, ranks)
            assert ledger.elements("reduce_scatter") == (1 if stage == 1 else k) * padded
            flags = ledger.total("all_reduce")
            backwards = 1 if stage == 1 else k
            tensors = len(list(zero.model.parameters()))
            assert (flags.calls, flags.bytes) == (backwards, backwards * tensors)
            calls = ledger.calls("reduce_scatter") + ledger.calls("all_gather") + flags.calls
            assert ledger.calls() == calls == passes * len(zero.units) + backwards

    launch(run, ranks)


def test_grad_norm_is_one_number_and_evaluation_gathers_once() -> None:
    def run() -> None:
        comm = world()
        zero = Zero(make("gpt-tied"), comm, 3).materialize(SEED, "float64")
        padded = sum(unit.padded for unit in zero.units)
        inputs, targets = data("gpt-tied", 1)[0]
        comm.ledger.reset()
        with no_grad():
            loss_of(zero, inputs, targets)
        once = (len(zero.units), padded, padded * 8)
        assert comm.ledger.as_dict() == {("all_gather", "world/gather0"): once}
        comm.ledger.reset()
        zero.grad_norm()
        assert comm.ledger.as_dict() == {("all_reduce", "world"): (1, 1, 8)}

    launch(run, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_in_float16_are_summed_in_float32(stage: int) -> None:
    """40,000 twice is beyond float16's 65,504, the ranks' sum is not."""

    def run() -> np.ndarray:
        zero = Zero(nn.Linear(3, 2, bias=False), world(), stage).materialize(0, "float16")
        x = np.full((1, 3), (40_000, 40_000, -40_000)[world().rank], np.float16)
        zero(Tensor(x)).sum().backward()
        assert all(t.grad.dtype == np.float16 for _, t in zero.shards())
        return zero.full("grad")["weight"]

    for g in launch(run, 3):
        assert np.array_equal(g, np.full((2, 3), 40_000, np.float16))


# --- Stage 3 ----------------------------------------------------------------------------------------------


class Recomputed(MLP):
    """An MLP that keeps its blocks' inputs only."""

    def forward(self, x: Any) -> Tensor:
        for block in self.blocks:
            x = recompute(block, x)
        return x


@pytest.mark.parametrize("prefetch", (True, False))
@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_units_are_gathered_as_often_as_others(stage: int, prefetch: bool) -> None:
    def run() -> list[Any]:
        comm = world()
        model = Recomputed(MLPConfig(inputs=15, classes=5, width=7, layers=3))
        comm.ledger.reset()
        steps = train(comm, "uneven", stage, "momentum", k=2, model=model, prefetch=prefetch)
        return [steps, comm.ledger.calls("all_gather", "world/gather0")]

    for steps, gathers in launch(run, 2):
        assert_equal_steps(steps, serial("uneven", "momentum"))
        assert gathers == (4 * 2 * 2 * 3 if stage == 3 else 0)  # steps, microbatches, passes, units


def test_prefetch_changes_no_bit() -> None:
    with_it, without = (on_threads(3, "gpt-tied", 3, "adamw", prefetch=p)[0] for p in (True, False))
    for a, b in zip(with_it, without):
        assert {n: v.tobytes() for n, v in a.state.items()} == {n: v.tobytes() for n, v in b.state.items()}


@pytest.mark.parametrize(
    ("kind", "cut"),
    (
        *((kind, None) for kind in ("gpt-tied", "gpt-untied", "convnet", "convnet-batch-norm", "mlp")),
        ("mlp", {}),
        *(("gpt-tied", {"sequence_parallel": on}) for on in (False, True)),
        *(("convnet", {"convolution": way}) for way in ("output", "input", "region")),
    ),
)
def test_nothing_keeps_a_freed_unit_alive(
    kind: str, cut: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After forward every gathered array is gone, although the graph is alive: all ops save handles.

    Also over a model that a plan has cut, where norms and convolutions use weights through `copy_to`.
    """
    gathered: list[tuple[FlatUnit, weakref.ref[Any]]] = []
    attach = FlatUnit.attach

    def remember(unit: FlatUnit, whole: np.ndarray) -> None:
        gathered.append((unit, weakref.ref(whole)))
        attach(unit, whole)

    monkeypatch.setattr(FlatUnit, "attach", remember)

    def run() -> None:
        mesh, model = Mesh(world(), tp=world().size), make(kind)
        if cut is not None:
            parallelize(model, mesh.tp, default_plan(model, **cut))
        zero = Zero(model, mesh.dp, 3).materialize(SEED, "float64")
        inputs, targets = data(kind, 1)[0]

        def mine() -> list[weakref.ref[Any]]:
            return [ref for unit, ref in gathered if unit in zero.units]

        loss = loss_of(zero, inputs, targets)
        assert len(mine()) == len(zero.units)
        assert [ref() is None for ref in mine()] == [True] * len(zero.units)
        loss.backward()
        del loss
        gc.collect()
        assert len(mine()) == 2 * len(zero.units) and not any(ref() is not None for ref in mine())

    launch(run, 1 if cut is None else 2)


@pytest.mark.parametrize("prefetch", (True, False))
def test_at_most_two_units_and_the_shared_one_are_there_at_once(
    prefetch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minipar.parallel.zero.gather import GatherOnUse

    most: dict[int, int] = {}
    need = GatherOnUse.need

    def counted(self: GatherOnUse, unit: FlatUnit) -> None:
        need(self, unit)
        whole = [u for u in self._units if u.whole is not None]
        count = len(whole) + len(self._under_way)
        most[self.comm.rank] = max(most.get(self.comm.rank, 0), count)

    monkeypatch.setattr(GatherOnUse, "need", counted)
    on_threads(2, "gpt-tied", 3, prefetch=prefetch, steps=1)
    assert most == {0: 2, 1: 2} if prefetch else most == {0: 1, 1: 1}


def test_gathering_changes_no_version_and_a_step_does() -> None:
    zero = Zero(make("uneven"), world(), 3).materialize(SEED, "float64")
    update = OPTIMIZERS["sgd"]([t for _, t in zero.shards()])
    p = next(zero.model.parameters())
    inputs, targets = data("uneven", 1)[0]
    before = p.version
    stale = loss_of(zero, inputs, targets)
    loss_of(zero, inputs, targets).backward()
    assert p.version == before and not p.is_materialized
    zero.step(update)
    assert p.version > before
    with pytest.raises(RuntimeError, match="changed in place"):
        stale.backward()


def test_two_graphs_may_be_alive_at_once() -> None:
    """Both forwards before both backwards: the leaves are shared, so hooks fire at the very end."""

    def run(stage: int) -> list[dict[str, np.ndarray]]:
        found = []
        for interleaved in (False, True):
            zero = Zero(make("uneven"), world(), stage).materialize(SEED, "float64")
            (a, ta), (b, tb) = data("uneven", 2)
            first = loss_of(zero, a, ta)
            if not interleaved:
                first.backward()
            second = loss_of(zero, b, tb)
            if interleaved:
                first.backward()
            second.backward()
            found.append(zero.full("grad"))
        return found

    for stage in STAGES:
        for one, other in launch(run, 2, stage):
            for name in one:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-12, atol=1e-14)


# --- Parameters that some ranks do not use ----------------------------------------------------------------


@pytest.mark.parametrize("prefetch", (True, False))
@pytest.mark.parametrize("stage", STAGES)
def test_units_and_parameters_that_some_ranks_do_not_use(stage: int, prefetch: bool) -> None:
    launch(lambda: train_branching(world(), stage, prefetch), 3, timeout=20)


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_samples_takes_part(stage: int) -> None:
    """By synchronize() in stages 1 and 2; in stage 3 it gathers as well, so it runs an empty share."""
    inputs, targets = data("uneven", 1)[0]
    plain = make("uneven").materialize(SEED, "float64")
    plain.loss(plain(Tensor(inputs)), targets).backward()

    def run() -> None:
        zero = Zero(make("uneven"), world(), stage).materialize(SEED, "float64")
        if world().rank == 0:
            loss_of(zero, inputs, targets).backward()
        elif stage < 3:
            zero.synchronize()
        else:
            with pytest.raises(UsageError, match="run them on an empty share"):
                zero.synchronize()
            loss_of(zero, inputs[:0], targets[:0]).backward()
        found = zero.full("grad")
        for name, p in plain.named_parameters():
            np.testing.assert_allclose(found[name], p.grad, rtol=1e-12, atol=1e-15)

    launch(run, 2)


def test_frozen_parameters_are_gathered_and_get_no_gradient() -> None:
    """A frozen weight is needed after the last gradient of its unit has come."""

    def freeze(model: Model) -> Model:
        for name, p in model.named_parameters():
            p.requires_grad = "mlp.c_proj" in name or name == "wpe.weight"
        return model

    inputs, targets = data("gpt-untied", 1)[0]
    plain = freeze(make("gpt-untied").materialize(SEED, "float64"))
    plain.loss(plain(inputs), targets).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}

    def run(stage: int) -> dict[str, np.ndarray]:
        zero = Zero(freeze(make("gpt-untied")), world(), stage).materialize(SEED, "float64")
        loss_of(zero, inputs, targets).backward()
        return zero.full("grad")

    for stage in STAGES:
        for found in launch(run, 2, stage):
            assert found.keys() == expected.keys()
            for name, g in found.items():
                np.testing.assert_allclose(g, 2 * expected[name], rtol=1e-12, atol=1e-15)


def test_a_rank_that_owns_nothing_has_an_optimizer_all_the_same() -> None:
    class Tiny(Model):
        def __init__(self) -> None:
            self.fc = nn.Linear(1, 2, bias=False)
            self.loss = nn.CrossEntropyLoss(reduction="sum")

        def forward(self, x: Any) -> Tensor:
            return self.fc(x)

    def run(stage: int) -> dict[str, np.ndarray]:
        zero = Zero(Tiny(), world(), stage).materialize(0, "float64")
        update = OPTIMIZERS["adamw"]([t for _, t in zero.shards()])
        loss_of(zero, np.ones((1, 1)), np.array([0])).backward()
        zero.step(update)
        return zero.full()

    for stage in STAGES:
        states = launch(run, 4, stage)
        assert len({state["fc.weight"].tobytes() for state in states}) == 1


# --- The whole model, and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_load_and_detach(stage: int) -> None:
    inputs, targets = data("gpt-tied", 1)[0]
    plain = make("gpt-tied").materialize(9, "float64").eval()
    expected = plain.loss(plain(inputs), targets).item()

    def run() -> None:
        zero = Zero(make("gpt-tied").eval(), world(), stage).materialize(SEED, "float64")
        update = OPTIMIZERS["adam"]([t for _, t in zero.shards()])
        loss_of(zero, inputs, targets).backward()
        zero.step(update)
        with pytest.raises(UsageError, match=r"Zero: wpe.weight is \(6, 8\), the given state has nothing"):
            zero.load({})
        zero.load(plain.state_dict())
        assert loss_of(zero, inputs, targets).item() == expected
        model = zero.detach()
        assert {n: v.tobytes() for n, v in model.state_dict().items()} == {
            n: v.tobytes() for n, v in plain.state_dict().items()
        }
        model.zero_grad()
        loss = model.loss(model(inputs), targets)
        loss.backward()
        assert loss.item() == expected
        assert all(p.grad is not None for p in model.parameters())

    launch(run, 2)


def test_the_table_names_units_padding_and_bytes() -> None:
    def run() -> str:
        return str(Zero(make("gpt-tied"), world(), 3).materialize(SEED, "float64"))

    lines = launch(run, 3)[0].splitlines()
    assert lines[0] == "ZeRO stage 3 over 3 ranks"
    assert lines[1].split() == ["unit", "tensors", "elements", "padding", "owned", "bytes"]
    assert lines[2].split() == ["unit", "0", "(Embed)", "1", "48", "0", "16", "128"]
    assert lines[-1].split() == ["shared", "1", "88", "2", "30", "240"]


# --- Refusals ---------------------------------------------------------------------------------------------


def test_refusals_before_anything_is_sent() -> None:
    comm = world()
    for stage in (0, 4, "3"):
        with pytest.raises(UsageError, match=r"Zero: stage '?\w'? does not exist: use 1, 2 or 3"):
            Zero(make("mlp"), comm, stage)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Zero: Sequential has no parameters to cut"):
        Zero(nn.Sequential(nn.ReLU()), comm, 3)
    partly = make("mlp")
    next(partly.parameters()).materialize(0, "layers.0.fc.weight")
    with pytest.raises(UsageError, match="materialised in part"):
        Zero(partly, comm, 1)
    mixed = make("mlp").materialize(0, "float32")
    weight = next(mixed.parameters())
    weight.data = weight.data.astype("float64")
    with pytest.raises(UsageError, match=r"Zero: unit 0 \(MLPBlock\) mixes float32 and float64"):
        Zero(mixed, comm, 2)
    with pytest.raises(UsageError, match=r"unit 0 \(Linear\) has a parameter \(3, 2\) that is not the"):
        Zero(make("mlp"), comm, 2, units=[nn.Linear(2, 3)])
    zero = Zero(make("mlp"), comm, 2)
    for call in (zero.shards, lambda: zero(Tensor(np.ones((1, 12))))):
        with pytest.raises(UsageError, match="no values yet: call materialize"):
            call()


@pytest.mark.parametrize("stage", STAGES)
def test_misuse_is_named(stage: int) -> None:
    zero = Zero(make("uneven"), world(), stage).materialize(SEED, "float64")
    inputs, targets = data("uneven", 1)[0]
    with pytest.raises(UsageError, match="has its values already"):
        zero.materialize(0)
    with pytest.raises(UsageError, match="full\\('weights'\\) is unknown: use data or grad"):
        zero.full("weights")  # type: ignore[arg-type]
    update = OPTIMIZERS["sgd"]([t for _, t in zero.shards()])
    loss_of(zero, inputs, targets).backward()
    with pytest.raises(UsageError, match="build the optimizer on the tensors of shards"):
        zero.step(OPTIMIZERS["sgd"](list(zero.model.parameters())))
    update.step()  # instead of zero.step(update)
    with pytest.raises(UsageError, match=r"take steps with step\(optimizer\)"):
        zero(Tensor(inputs))


def test_stage_3_is_called_through_the_wrapper() -> None:
    zero = Zero(make("uneven"), world(), 3).materialize(SEED, "float64")
    with pytest.raises(UsageError, match=r"unit 0 \(MLPBlock\) was called outside a forward of the Zero"):
        zero.model(Tensor(np.ones((2, 15))))
    with pytest.raises(UsageError, match=r"layers.0.fc.weight \(7, 15\) lies in pieces on the ranks"):
        zero.model.state_dict()


def test_batch_norm_with_microbatches_is_refused() -> None:
    zero = Zero(make("convnet-batch-norm"), world(), 2).materialize(SEED, "float64")
    with pytest.raises(UsageError, match="is batch norm, which mixes the samples"), zero.no_sync():
        pass


def test_gradients_of_which_some_are_deferred_are_refused() -> None:
    """All deferred (linear layers only) is one backward, later; some now and some later are two."""
    inputs, targets = data("uneven", 1)[0]
    zero = Zero(make("uneven"), world(), 3).materialize(SEED, "float64")
    loss_of(zero, inputs, targets).backward()
    expected = zero.full("grad")
    zero.zero_grad()
    deferred: list[Any] = []
    loss_of(zero, inputs, targets).backward(deferred=deferred)
    run_deferred(deferred)
    for name, g in zero.full("grad").items():
        assert np.array_equal(g, expected[name]), name
    zero = Zero(make("gpt-tied"), world(), 2).materialize(SEED, "float64")
    with pytest.raises(UsageError, match="deferred weight gradients outlive"):
        loss_of(zero, *data("gpt-tied", 1)[0]).backward(deferred=[])


def test_units_out_of_order_are_refused_instead_of_summed_twice() -> None:
    def run() -> None:
        model = make("uneven")
        zero = Zero(model, world(), 2, units=list(reversed(model.blocks))).materialize(SEED, "float64")
        inputs, targets = data("uneven", 1)[0]
        loss_of(zero, inputs, targets).backward()

    with pytest.raises(UsageError, match="give units in the order in which forward uses them"):
        launch(run, 2)
