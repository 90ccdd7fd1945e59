"""Memory under ZeRO: bytes by kind are the formulas', and a model too large for one rank trains on four."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minipar import Tensor, launch, optim, world
from minipar.models import GPT, GPTConfig, Model
from minipar.parallel.data_parallel import DataParallel
from minipar.parallel.memory import Held, held, saved_arrays, zero_formula
from minipar.parallel.zero.zero import Zero
from minipar.runs import metrics_until
from tests.commands.command_line import idx_folder, minipar
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
    """Buckets included: they are the gradients' own memory, and one flag a tensor."""

    def run() -> None:
        model = gpt().materialize(SEED, "float32")
        parallel = DataParallel(model, world(), bucket_mb=0.001)
        assert len(parallel.buckets) > 2
        optimizer = optim.AdamW(model.parameters())
        psi, flags = sum(p.size for p in model.parameters()), len(list(model.parameters()))
        formula = zero_formula(psi, 3, 0, ITEM, 2)
        for _ in range(2):
            optimizer.zero_grad()
            inputs, targets = tokens(world().rank)
            loss = model.loss(parallel(inputs), targets)
            loss.backward()
            parallel.step(optimizer)
            now = held(model, optimizer)
            assert now.parameters == formula["parameters"]
            assert now.gradients == formula["gradients"] + flags * ITEM
            assert now.optimizer == formula["optimizer"]
            assert now.total == (4 * psi + flags) * ITEM  # 16 bytes a parameter in float32

    launch(run, 3)


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


# --- A model that one rank cannot hold --------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
CAPPED = "tests/parallel/capped.py"


def readme_commands() -> list[list[str]]:
    """The commands under a cap that the README shows: on one rank, and on four with ZeRO 3."""
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line.removeprefix("$ ").split() for line in lines if CAPPED in line and line.startswith("$ ")]


def capped(words: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    """One of them, run in `place`."""
    words = [sys.executable, "-m", *(str(ROOT / CAPPED) if word == CAPPED else word for word in words)]
    settings = {"PYTHONPATH": str(ROOT), "MINIPAR_TIMEOUT": "40"}
    return subprocess.run(
        words, cwd=place, env={**os.environ, **settings}, capture_output=True, text=True, timeout=100,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the cap is measured in Linux's /proc")
def test_a_model_that_cannot_be_allocated_on_one_rank_trains_on_four(tmp_path: Path) -> None:
    """By the command, from initialisation to the weights' file; the parameters alone are above the cap."""
    few = idx_folder(tmp_path / "few")
    one, four = ([*command, "--data", str(few), "--steps", "1"] for command in readme_commands())
    cap = int(one[one.index(CAPPED) + 1]) * 2**20
    alone = capped(one, tmp_path)
    assert alone.returncode == 1 and "minipar: out of memory: " in alone.stderr, alone.stdout + alone.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
    sharded = capped(four, tmp_path)
    assert sharded.returncode == 0, sharded.stdout + sharded.stderr
    plain = minipar(*one[one.index("train") :], "--out", tmp_path / "serial")  # here, without a cap
    assert plain.code == 0, plain.err
    ours, theirs = tmp_path / "runs" / "last", tmp_path / "serial"
    assert (theirs / "model.safetensors").stat().st_size > cap
    a, b = (metrics_until(run / "metrics.jsonl", 99) for run in (ours, theirs))
    np.testing.assert_allclose([x["loss"] for x in a], [x["loss"] for x in b], rtol=1e-5)
    np.testing.assert_allclose([x["grad_norm"] for x in a], [x["grad_norm"] for x in b], rtol=1e-5)
    found, expected = (load_file(run / "model.safetensors") for run in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5 * np.abs(value).max(), rtol=0, err_msg=name)
