"""On a GPU: whole training steps against the CPU's, captured steps against eager ones, ranks that share the card.

    python -m pytest -m gpu        # skipped, with the reason, where there is no GPU
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minipar
from minipar import Tensor, optim, random
from minipar.amp import GradScaler, autocast
from minipar.backend import to_device, to_host
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.flat import FlatTensor
from minipar.models import GPT, MLP, GPTConfig, MLPConfig, PatchNet, PatchNetConfig
from minipar.planner.fullest import fullest
from minipar.recompute import recompute_blocks
from minipar.training import Job
from tests.gpu.device import needs_gpu
from tests.gpu.test_gpu import compare

pytestmark = needs_gpu
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GPT_SIZES = GPTConfig(96, 32, 64, 2, 4)


def gpt_data() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 96, (4, 33))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def train(
    model: Any,
    device: str,
    data: tuple[np.ndarray, np.ndarray],
    optimizer: Callable[[list[Tensor]], optim.Optimizer],
    steps: int = 3,
    dtype: str = "float64",
    context: Callable[[], Any] | None = None,
) -> tuple[list[float], list[np.ndarray]]:
    """Return the losses and the final parameters, on the host."""
    model.materialize(seed=0, dtype=dtype, device=device)
    x, y = (to_device(a, device) for a in data)
    chosen, losses = optimizer(list(model.parameters())), []
    for step in range(steps):
        model.zero_grad()
        with random.at(seed=0, step=step, first_sample=0):
            loss = model.loss(model(Tensor(x) if x.dtype.kind == "f" else x), y) / y.size
            loss.backward()
        chosen.step()
        losses.append(loss.item())
    return losses, [to_host(p.data) for p in model.parameters()]


def same(make: Callable[[], Any], data: Any, optimizer: Any, tolerance: float = 1e-8) -> None:
    (ours, mine), (theirs, expected) = (train(make(), device, data, optimizer) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    for got, want in zip(mine, expected):
        compare(got, want, tolerance)


# ε large enough that the sign of a gradient near zero does not decide a whole step
@pytest.mark.parametrize("kind", (optim.AdamW, optim.Adam))
def test_adam_takes_the_cpu_s_steps(kind: Any) -> None:
    same(lambda: GPT(GPT_SIZES), gpt_data(), lambda ps: kind(ps, lr=1e-2, eps=1e-3, weight_decay=0.1))


@pytest.mark.parametrize("capturable", (False, True))
def test_adamw_over_a_flat_array_takes_the_same_steps(capturable: bool) -> None:
    def flat(ps: list[Tensor]) -> optim.Optimizer:
        return optim.AdamW([FlatTensor(ps)], lr=1e-2, eps=1e-3, weight_decay=0.1, capturable=capturable)

    same(lambda: GPT(GPT_SIZES), gpt_data(), flat)


def test_dropout_draws_the_cpu_s_masks() -> None:
    sizes = GPTConfig(96, 32, 64, 2, 4, dropout=0.2)
    same(lambda: GPT(sizes), gpt_data(), lambda ps: optim.SGD(ps, lr=0.1))


def test_recomputed_blocks() -> None:
    def make() -> Any:
        model = GPT(GPTConfig(96, 32, 64, 2, 4, dropout=0.1))
        recompute_blocks(model)
        return model

    same(make, gpt_data(), lambda ps: optim.SGD(ps, lr=0.1))


def test_patchnet() -> None:
    rng = np.random.default_rng(0)
    data = rng.standard_normal((4, 3, 8, 8)), rng.integers(0, 10, (4, 4, 4))
    same(lambda: PatchNet(PatchNetConfig(3, 10, 8, 2, 2)), data, lambda ps: optim.SGD(ps, lr=0.1))


def test_autocast_and_scaler_follow_the_cpu() -> None:
    """float16 products differ in their last bit, so the losses are compared, and that the scale did what it does."""

    def run(device: str) -> tuple[list[float], list[float]]:
        model = GPT(GPT_SIZES).materialize(seed=0, dtype="float32", device=device)
        x, y = (to_device(a, device) for a in gpt_data())
        optimizer, scaler = optim.SGD(model.parameters(), lr=0.1), GradScaler(2.0**30, growth_interval=3)
        casting, losses, scales = autocast("float16"), [], []
        for _ in range(20):
            model.zero_grad()
            with casting:
                loss = model.loss(model(x), y) / y.size
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        return losses, scales

    (ours, mine), (theirs, expected) = run("cuda"), run("cpu")
    np.testing.assert_allclose(ours, theirs, rtol=2e-2)
    assert ours[-1] < ours[0] and mine[0] < 2.0**30, "the first scale overflows, and smaller ones train"
    assert abs(np.log2(mine[-1]) - np.log2(expected[-1])) <= 1


@pytest.mark.parametrize("precision", ("float32", "float16"))
def test_a_captured_training_step_with_adamw_is_the_eager_one(precision: str) -> None:
    """Two steps warm up and three replay, on data that changes: stale casts or step counts would show in the losses."""
    from minipar.kernels.gpu_graph import CapturedStep

    batches = [np.random.default_rng(i).integers(0, 96, (4, 33)) for i in range(4)]
    casting = autocast("float16", enabled=precision == "float16")  # one object throughout, as a job has it

    def start() -> tuple[Any, Any, Any, Callable[[], Any]]:
        model = GPT(GPT_SIZES).materialize(seed=0, dtype="float32", device="cuda")
        weights = FlatTensor(model.parameters())
        optimizer = optim.AdamW([weights], lr=1e-2, eps=1e-2, capturable=True)
        ids = to_device(batches[0], "cuda")

        def step() -> Any:
            model.zero_grad()
            with casting:
                loss = model.loss(model(ids[:, :-1]), ids[:, 1:].copy()) / (4 * 32 / 1024)
            loss.backward()
            gradient = weights.grad
            gradient *= np.float32(1 / 1024)
            optimizer.step()
            return loss.data

        return model, optimizer, ids, step

    model, optimizer, ids, step = start()
    captured_model, captured_optimizer, captured_ids, captured = start()
    step()
    step()
    replay = CapturedStep(captured)
    for i, batch in enumerate(batches[1:]):
        for o in (optimizer, captured_optimizer):
            o.set_lr(1e-2 / (i + 1))
        ids[...], captured_ids[...] = to_device(batch, "cuda"), to_device(batch, "cuda")
        compare(replay(), to_host(step()), 1e-3 if precision == "float16" else 1e-5)
    for got, want in zip(captured_model.parameters(), model.parameters()):
        compare(got.data, to_host(want.data), 1e-3)
        assert got.version == want.version + 1, "the capture itself is counted as well"
    with casting:  # and outside the graph the weights are seen as they are now
        x = to_device(batches[0][:, :-1].copy(), "cuda")
        compare(captured_model(x).data, to_host(model(x).data), 2e-2)


@pytest.mark.parametrize(("amp", "most"), (("off", 2), ("fp16", 3)))
def test_a_job_s_step_waits_for_its_loss_its_norm_and_the_overflow_only(
    amp: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from waits import Waits

    sizes = dict(model="gpt", device="cuda", dtype="float32", amp=amp, accumulate=2, steps=4)
    job = Job(TrainConfig(**sizes).resolved(VERIFY_DEFAULTS), minipar.world())  # type: ignore[arg-type]
    steps = job.train()
    next(steps)
    with Waits(sys.modules["cupy"]) as waits:
        next(steps)
    assert waits.total <= most, str(waits)


def test_what_a_job_on_a_gpu_holds_is_counted_too() -> None:
    """Activations are not compared: the kernels of a GPU keep other arrays."""

    def counted(device: str) -> tuple[int, int, int]:
        config = TrainConfig(model="gpt", device=device, dtype="float32", steps=1).resolved(VERIFY_DEFAULTS)
        job = Job(config, minipar.world())
        for _ in job.train():
            pass
        found = fullest(job, next(iter(job.loader)))
        assert found.activations > 0
        return found.parameters, found.gradients, found.optimizer

    assert counted("cuda") == counted("cpu")


LAYOUTS = ((), ("--tp", "2"), ("--pp", "2"), ("--zero", "1"), ("--zero", "3"), ("--partition", "bytes"))


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda words: " ".join(words) or "dp")
def test_two_ranks_on_one_card_are_equal_to_serial(layout: tuple[str, ...]) -> None:
    """Their messages go through the host's memory, unless the MPI library reads the GPU's."""
    from minipar.comm.launcher import run_mpi

    command = [sys.executable, "-m", "minipar", "verify", "gpt", "--device", "cuda", "--steps", "3", *layout]
    assert run_mpi(command, 2, timeout=100) == 0


@pytest.mark.mpi
def test_collectives_and_messages_of_gpu_arrays() -> None:
    from minipar.comm.launcher import run_mpi

    assert run_mpi([sys.executable, str(Path(__file__).parent / "mpi_arrays.py")], 2, timeout=100) == 0


def test_a_model_of_one_layer_is_flat_and_captured_too() -> None:
    """The smallest thing that can be captured: no matrix of a stack, one bias."""
    from minipar.kernels.gpu_graph import CapturedStep

    model = MLP(MLPConfig(3, 2, 4, 1)).materialize(seed=0, device="cuda")
    x, y = to_device(np.ones((5, 3), np.float32), "cuda"), to_device(np.array([0, 1, 0, 1, 1]), "cuda")

    def work() -> Any:
        model.zero_grad()
        (model.loss(model(Tensor(x)), y) / 5).backward()

    CapturedStep(work)()
    got = [to_host(p.grad) for p in model.parameters()]
    work()
    for a, p in zip(got, model.parameters()):
        compare(a, to_host(p.grad), 1e-6)
