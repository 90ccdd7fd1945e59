"""Mixed precision under every layout: equal to serial, and one decision on all ranks."""

import functools
from typing import Any

import numpy as np
import pytest

from minipar import launch, ops, optim, world
from minipar.amp import GradScaler, autocast
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.data import Data, load
from minipar.errors import UsageError
from minipar.nn import Linear, Sequential
from minipar.parallel import DataParallel
from minipar.parallel.tensor_parallel.parallelize import parallelize
from minipar.parallel.tensor_parallel.styles import Row
from minipar.parallel.zero.zero import Zero
from minipar.tensor import Tensor
from minipar.training import Job, TrainingFailed
from minipar.verification import Fewer, Report, verify

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "dp 2": (2, {}),
    "dp 3, microbatches": (3, {"accumulate": 2}),
    "master": (3, {"aggregation": "master"}),
    "owners": (3, {"partition": "bytes"}),
    "local": (2, {"aggregation": "local", "clip": 0.0}),
    "zero 1": (2, {"zero": 1}),
    "zero 2": (2, {"zero": 2, "accumulate": 2}),
    "zero 3": (3, {"zero": 3}),
    "zero 3, recompute": (2, {"zero": 3, "recompute": True}),
    "tp 2 dp 2": (4, {"tp": 2, "dp": 2}),
    "sequence parallel": (2, {"tp": 2, "sequence_parallel": True}),
    "layers": (2, {"partition": "cost"}),
    "pp 2 dp 2": (4, {"pp": 2, "dp": 2}),
    "pp 2, zero bubble": (2, {"pp": 2, "schedule": "zb-h1"}),
    "pp 2, recompute": (2, {"pp": 2, "recompute": True}),
}


LONG = ("tp 2 dp 2", "pp 2 dp 2", "zero 3")  # one of each kind, over ten steps; the others over three


@functools.cache
def data(kind: str = "gpt") -> Data:
    whole = load("docs", seq_len=16) if kind == "gpt" else load("digits")
    return Data(Fewer(whole.train, 23), Fewer(whole.valid, 9), whole.info, whole.vocabulary)


def config(kind: str = "gpt", **changes: Any) -> TrainConfig:
    settings = {"model": kind, "optimizer": "sgd", "amp": "fp16", "steps": 3, "dtype": None, **changes}
    return TrainConfig(**settings).resolved(VERIFY_DEFAULTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_equals_serial_fp16(layout: str) -> None:
    ranks, options = LAYOUTS[layout]
    shared, steps = data(), 10 if layout in LONG else 3

    def program() -> Report:
        return verify(config(**options, steps=steps), world(), shared)

    for report in launch(program, ranks, timeout=30):
        assert report.holds, (layout, report)
        assert report.worst["loss"].compared == ranks * steps


def test_a_convnet_and_an_mlp_do_as_well() -> None:
    for kind, options in (("convnet", {"tp": 2}), ("mlp", {"tp": 2, "dp": 2})):
        shared = data(kind)

        def program(kind: str = kind, options: Any = options, shared: Data = shared) -> Report:
            return verify(config(kind, **options), world(), shared)

        assert all(r.holds for r in launch(program, 2 * options.get("dp", 1), timeout=30)), kind


def test_bfloat16_equals_serial_bfloat16() -> None:
    shared = data()
    for options in ({"zero": 3}, {"pp": 2}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}):

        def program(options: Any = options) -> Report:
            return verify(config(amp="bf16", **options), world(), shared)

        assert all(r.holds for r in launch(program, 2, timeout=30)), options


def state_of(job: Job) -> dict[str, bytes]:
    """Everything that a skipped step must not change, as this rank holds it."""
    state = {f"weight {name}": a.tobytes() for name, a in job.strategy.held("data").items()}
    for i, entry in job.optimizer.state.items():
        state |= {f"{k} of {i}": np.asarray(v).tobytes() for k, v in entry.items()}
    return state


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "alone"])
def test_an_overflow_on_one_rank_makes_all_skip(layout: str) -> None:
    """The infinity is put into one rank's gradient only, after the sums over ranks."""
    ranks, options = LAYOUTS[layout]
    shared = data()

    def program() -> list[Any]:
        job = Job(config(optimizer="adamw", **options), world(), shared)
        seen: list[Any] = []
        for step, batch in enumerate(job.loader.steps(3)):
            job.forward_backward(batch)
            unlucky = 0 if layout == "master" else ranks - 1  # the master alone has gradients
            if step == 1 and world().rank == unlucky:
                next(t for _, t in job.strategy.optimizer_tensors() if t.grad is not None).grad.flat[0] = (
                    np.inf
                )
            before = state_of(job)
            job.update(batch)
            seen.append((before == state_of(job), job.precision.scaler.get_scale(), job.precision.skipped))
        return seen

    for skipped in launch(program, ranks, timeout=30):
        assert skipped[1] == (True, 2.0**15, 1), "all ranks skip, and all lower the scale"
        assert skipped[0] == (False, 2.0**16, 0) and skipped[2] == (False, 2.0**15, 1)


def test_every_rank_fails_alike_where_no_scale_helps() -> None:
    shared = data("mlp")

    def program() -> str:
        job = Job(config("mlp", loss_scale=4.0), world(), shared)
        batch = next(iter(job.loader.steps(1)))
        job.forward_backward(batch)
        if world().rank == 1:
            next(job.model.parameters()).grad[0] = np.nan
        with pytest.raises(
            TrainingFailed, match="step 1: gradients overflow at the smallest loss scale"
        ) as e:
            job.update(batch)
        return str(e.value)

    assert len(set(launch(program, 2, timeout=20))) == 1


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_training_goes_on_after_overflows() -> None:
    """The first scale is far too large: it falls until the gradients fit, and the loss goes down."""
    shared = data("mlp")

    def program() -> tuple[list[float | None], list[float], float]:
        job = Job(config("mlp", steps=40, optimizer="adamw", lr=0.01), world(), shared)
        job.precision.scaler.update(2.0**30)
        records = list(job.train())
        return [r.grad_norm for r in records], [r.loss for r in records], job.precision.scaler.get_scale()

    (norms, losses, scale), other = launch(program, 2, timeout=30)
    assert (norms, losses, scale) == other
    assert norms[0] is None and norms[-1] is not None and scale < 2.0**30
    assert losses[-1] < 0.7 * losses[0]


def test_sums_of_gradients_over_ranks_are_float32_and_cannot_overflow_float16() -> None:
    """Each rank's gradient fits float16 (48000), their sum (96000) does not."""

    def program() -> list[np.ndarray]:
        comm, found = world(), []
        for wrap in (lambda m: DataParallel(m, comm), lambda m: Zero(m, comm, 2)):
            layer = Linear(1, 1, bias=False).materialize(0)
            parallel = wrap(layer)
            with autocast():
                loss = ops.astype(parallel(Tensor(np.full((1, 1), 48000.0, "float32"))), "float32").sum()
            loss.backward()
            full = parallel.full("grad")["weight"] if isinstance(parallel, Zero) else layer.weight.grad
            found.append(full)
        return found

    for gradients in launch(program, 2, timeout=20):
        assert all(g.dtype == np.float32 and g.item() == 96000 for g in gradients)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in the backward that is refused
def test_a_model_in_float16_throughout_sums_its_gradients_in_float32() -> None:
    """48000 + 48000 - 40000 fits float16, the sum of the first two does not."""

    def program() -> list[np.ndarray]:
        layer = Linear(1, 1, bias=False).materialize(0, "float16")
        parallel, found = DataParallel(layer, world()), []
        for _ in range(2):
            layer.zero_grad()
            x = np.full((1, 1), (48000.0, 48000.0, -40000.0)[world().rank], "float16")
            parallel(Tensor(x)).sum().backward()
            assert layer.weight.grad is not None
            found.append(layer.weight.grad.copy())
        with pytest.raises(UsageError, match="is summed over the ranks already"):
            parallel(Tensor(x)).sum().backward()
        return found

    for gradients in launch(program, 3, timeout=20):
        assert all(g.dtype == np.float16 and g.item() == 56000 for g in gradients)


def test_terms_of_a_row_layer_are_summed_before_they_are_rounded() -> None:
    """683 · 3 - 1024 · 2 = 1; rounded to float16 first, 2049 would be 2048 and the sum 0."""

    def program() -> tuple[np.ndarray, np.dtype[Any]]:
        model = Sequential(Linear(2, 1, bias=False))
        parallelize(model, world(), {"0": Row(scattered=True)})
        model.materialize(0)
        model[0].weight.assign_(np.array([[3.0, -2.0]], "float32")[:, [world().rank]])
        with autocast():
            y = model(Tensor(np.array([[683.0, 1024.0]], "float32")))
        return y.data, y.dtype

    for y, dtype in launch(program, 2, timeout=20):
        assert dtype == np.float16 and y.item() == 1


def test_zero_3_keeps_no_float16_copies_between_steps() -> None:
    shared = data()

    def program() -> int:
        job = Job(config(zero=3), world(), shared)
        job.forward_backward(next(iter(job.loader.steps(1))))
        return len(job.precision._autocast._copies)  # type: ignore[union-attr]

    assert launch(program, 2, timeout=20) == [0, 0]


def test_the_scaler_agrees_over_its_communicator() -> None:
    def program() -> tuple[float, float]:
        comm = world()
        w = Tensor(np.zeros(2, "float32"), requires_grad=True)
        optimizer, scaler = optim.SGD([w], lr=1.0), GradScaler(8.0, comm=comm)
        w.grad = np.array([8.0, np.nan if comm.rank == 2 else 8.0], "float32")
        scaler.step(optimizer)
        scaler.update()
        return w.data[0].item(), scaler.get_scale()

    assert launch(program, 3, timeout=20) == [(0.0, 4.0)] * 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"amp": "fp8"}, "--amp 'fp8' is unknown: use one of off, fp16, bf16"),
        ({"dtype": "float64"}, "--amp fp16 keeps float32 master weights: give --dtype float32, not float64"),
        ({"amp": "bf16", "device": "cuda"}, "--amp bf16 is for --device cpu"),
        ({"amp": "bf16", "loss_scale": 2.0}, "--loss-scale is about float16's range"),
        ({"amp": "off", "precision_policy": "p.toml"}, "--precision-policy is about float16's range"),
        ({"loss_scale": -1.0}, "--loss-scale is -1.0, it must be positive"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        config(**changes)
