"""Memory under ZeRO: bytes by kind are the formulas', and a model too large for one rank trains on four."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from minipar import Tensor, launch, optim, world
from minipar.comm.launcher import find_mpirun, is_open_mpi, job_environment
from minipar.models import GPT, GPTConfig, Model
from minipar.parallel.memory import Held, held, saved_arrays, zero_formula
from minipar.parallel.zero.zero import Zero
from tests.parallel import zero_capped
from tests.parallel.zero_runs import SEED, data, loss_of, make

STAGES = (1, 2, 3)
ITEM = 4  # float32
STATES = {"sgd": 0, "momentum": 1, "adamw": 2}


def build(tensors: list[Tensor], kind: str) -> optim.Optimizer:
    if kind == "adamw":
        return optim.AdamW(tensors)
    return optim.SGD(tensors, lr=0.01, momentum=0.9 if kind == "momentum" else 0.0)


def gpt(tied: bool = True) -> Model:
    return GPT(GPTConfig(vocab=13, seq_len=6, width=8, layers=2, heads=2, tied=tied))


def tokens(rank: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rank)
    return rng.integers(0, 13, (2, 6)), rng.integers(0, 13, (2, 6))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("ranks", "kind", "tied"), ((2, "sgd", True), (3, "momentum", False), (3, "adamw", True))
)
def test_held_is_the_formula_plus_the_padding(ranks: int, stage: int, kind: str, tied: bool) -> None:
    """After the backward of a microbatch, after that of the last one, and after the step."""

    def run() -> None:
        comm = world()
        zero = Zero(gpt(tied), comm, stage).materialize(SEED, "float32")
        optimizer = build([t for _, t in zero.shards()], kind)
        psi = sum(unit.numel for unit in zero.units)
        padding = sum(unit.padding for unit in zero.units)
        assert psi == sum(p.size for p in gpt(tied).materialize(0).parameters())
        assert padding < ranks * len(zero.units)
        formula = zero_formula(psi, ranks, stage, ITEM, STATES[kind])
        part = (psi + padding) * ITEM // ranks  # a rank's ranges
        owned = sum(piece.tensor.data.nbytes for unit in zero.units for piece in unit.pieces)
        whole = psi * ITEM
        for _ in range(2):
            zero.zero_grad()
            for last in (False, True):
                inputs, targets = tokens(comm.rank)
                loss = loss_of(zero, inputs, targets) / 48
                if last:
                    loss.backward()
                else:
                    with zero.no_sync():
                        loss.backward()
                now = held(zero, optimizer)
                parameters = part if stage == 3 else whole + padding * ITEM
                assert now.parameters == parameters
                share = Fraction(1, ranks) if stage == 3 else 1
                assert now.parameters - formula["parameters"] == padding * ITEM * share
                # stage 1 keeps whole gradients until the last microbatch, then its range of their sum
                if stage == 1 and not last:
                    assert now.gradients == whole == formula["gradients"]
                else:
                    assert now.gradients == part
                if stage > 1:
                    assert now.gradients - formula["gradients"] == Fraction(padding * ITEM, ranks)
                assert now.messages == 0
            zero.step(optimizer)
            now = held(zero, optimizer)
            assert now.optimizer == STATES[kind] * owned
            assert abs(now.optimizer - formula["optimizer"]) <= STATES[kind] * padding * ITEM
            assert now.total == now.parameters + now.gradients + now.optimizer

    launch(run, ranks)


def test_plain_data_parallelism_is_stage_0() -> None:
    model = gpt().materialize(SEED, "float32")
    optimizer = optim.AdamW(model.parameters())
    inputs, targets = tokens(0)
    model.loss(model(inputs), targets).backward()
    optimizer.step()
    psi = sum(p.size for p in model.parameters())
    formula = zero_formula(psi, 4, 0, ITEM, 2)
    now = held(model, optimizer)
    assert (now.parameters, now.gradients, now.optimizer) == tuple(formula.values())
    assert now.total == 4 * psi * ITEM  # 16 bytes a parameter in float32


@pytest.mark.parametrize("stage", (2, 3))
def test_backward_holds_one_unit_of_gradients_that_is_not_on_its_way(stage: int) -> None:
    """Seen at every gradient: the flat gradients of one unit and of the shared one, never a whole model's."""

    def run() -> None:
        zero = Zero(gpt(), world(), stage).materialize(SEED, "float32")
        shared = zero.units[-1].padded * ITEM
        largest = max(unit.padded for unit in zero.units[:-1]) * ITEM
        seen: list[int] = []
        for p in zero.model.parameters():
            p.register_hook(lambda _: seen.append(held(zero).gradients))
        inputs, targets = tokens(0)
        loss_of(zero, inputs, targets).backward()
        assert len(seen) == len(list(zero.model.parameters()))
        assert max(seen) <= largest + shared < sum(unit.numel for unit in zero.units) * ITEM

    launch(run, 2)


@pytest.mark.parametrize("kind", ("gpt-tied", "convnet", "uneven"))
@pytest.mark.parametrize("stage", STAGES)
def test_activations_are_those_of_the_serial_model(kind: str, stage: int) -> None:
    """Not a byte more: no freed unit is kept alive by the graph, and gathered weights are not activations."""
    inputs, targets = data(kind, 1)[0]
    plain = make(kind).materialize(SEED, "float64").eval()
    output = plain(inputs if inputs.dtype.kind == "i" else Tensor(inputs))
    expected = held(plain, output=plain.loss(output, targets))
    del output
    zero = Zero(make(kind).eval(), world(), stage).materialize(SEED, "float64")
    loss = loss_of(zero, inputs, targets)
    assert held(zero, output=loss).activations == expected.activations > inputs.nbytes
    loss.backward()
    assert held(zero, output=loss).activations == 0


def test_saved_arrays_are_counted_once_and_by_the_memory_behind_them() -> None:
    base = np.ones((4, 1000))
    x = Tensor(base[:, :10], requires_grad=True)
    y = (x * x).sum() + (x * x).sum()
    assert {id(a.base if a.base is not None else a) for a in saved_arrays(y)} == {id(base)}
    plain = make("uneven").materialize(0, "float64")
    assert held(plain, output=y).activations == base.nbytes


def test_the_ledger_prints_one_line_a_kind() -> None:
    lines = str(Held(parameters=1000, gradients=20, optimizer=3)).splitlines()
    assert lines[0] == "parameters  1,000 bytes" and lines[-1] == "total       1,023 bytes"


# --- A model that one rank cannot hold --------------------------------------------------------------------

CAP = 140  # MiB; the parameters, gradients and Adam's moments of one rank alone are 193


def run_capped(ranks: int, kind: str) -> subprocess.CompletedProcess[str]:
    """`zero_capped.py` on real MPI ranks, each under the cap."""
    program = find_mpirun()
    root = Path(__file__).parents[2]
    # Freed arrays go back to the system at once, so that what is counted is what is held.
    settings = {"PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536", "MINIPAR_TIMEOUT": "40"}
    return subprocess.run(
        [program, "-n", str(ranks), sys.executable, zero_capped.__file__, kind, str(CAP)],
        env=job_environment(ranks, is_open_mpi(program), {**os.environ, **settings}),
        capture_output=True,
        text=True,
        timeout=100,
        start_new_session=True,
    )


@pytest.mark.mpi
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the cap is measured in Linux's /proc")
def test_a_model_too_large_for_one_rank_trains_on_four() -> None:
    alone = run_capped(1, "serial")
    assert alone.returncode != 0 and "MemoryError" in alone.stderr, alone.stdout + alone.stderr
    four = run_capped(4, "zero")
    assert four.returncode == 0, four.stdout + four.stderr
    found = [float(word) for word in four.stdout.split()]
    expected = zero_capped.losses(world(), sharded=False)  # here, without a cap
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_steps_do_not_leak(stage: int) -> None:
    """What is held after the last step is what is held after the second."""

    def run() -> None:
        zero = Zero(gpt(), world(), stage).materialize(SEED, "float32")
        optimizer = build([t for _, t in zero.shards()], "adamw")
        seen = []
        for _ in range(4):
            zero.zero_grad()
            loss_of(zero, *tokens(0)).backward()
            zero.step(optimizer)
            seen.append(held(zero, optimizer))
        assert seen[1] == seen[2] == seen[3]

    launch(run, 2)
