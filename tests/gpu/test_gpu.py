"""On a GPU: every kernel, operation and model against NumPy; a step that waits for nothing, captured as a graph.

    python -m pytest -m gpu        # skipped, with the reason, where there is no GPU
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minipar import Tensor, optim
from minipar.amp import GradScaler, autocast
from minipar.backend import device_module, to_device, to_host
from minipar.kernels import gpu, gpu_blas, plain
from minipar.kernels.gpu_launch import contiguous, copy, copy_rows
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig
from minipar.verification import TOLERANCE as VERIFIED
from minipar.verification import relative_error
from tests.gpu.device import needs_gpu
from tests.gpu.kernel_cases import CASES
from tests.gpu.test_gpu_blas import PAIRS
from tests.op_cases import ALL, Case, listed

pytestmark = needs_gpu
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


def on_device(value: Any) -> Any:
    return to_device(value, "cuda") if isinstance(value, np.ndarray) else value


def compare(got: Any, want: Any, tolerance: float) -> None:
    got, want = to_host(got).astype(float), np.asarray(want).astype(float)
    finite = np.abs(want[np.isfinite(want)])
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, finite.max(initial=0.0)))


@pytest.mark.parametrize("dtype", ("float32", "float64", "float16"))
@pytest.mark.parametrize("name", CASES)
def test_fused_kernels_are_the_plain_formulas(name: str, dtype: str) -> None:
    arguments, options, tolerance = CASES[name](dtype)
    kernel = name.split(",")[0]
    here = [on_device(a) for a in arguments]
    got = getattr(gpu, kernel)(*here, **{k: on_device(v) for k, v in options.items()})
    want = getattr(plain, kernel)(*arguments, **options)
    if got is None:  # in place
        got, want = tuple(here), tuple(arguments)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    for a, b in pairs:
        if isinstance(b, np.ndarray):
            assert a.shape == b.shape and (kernel != "cast" or a.dtype == b.dtype)
            compare(a, b, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "case"), listed(ALL))
def test_operations_and_their_gradients(name: str, case: Case, dtype: str) -> None:
    def run(place: Any) -> list[Any]:
        tensors = [Tensor(place(a), requires_grad=True) for a in case.inputs(dtype)]
        outs = case.fn(*tensors)
        outs = outs if isinstance(outs, tuple) else (outs,)
        total = sum(((o * 0.5).sum() for o in outs[1:]), start=(outs[0] * 0.5).sum())
        total.backward()
        return [*(o.data for o in outs), *(t.grad for t in tensors)]

    for got, want in zip(run(on_device), run(np.copy), strict=True):
        compare(got, want, TOLERANCE[dtype])


MODELS = {
    "gpt": (lambda: GPT(GPTConfig(96, 32, 64, 2, 4)), (4, 32)),
    "mlp": (lambda: MLP(MLPConfig(20, 10, 32, 3)), (6, 20)),
    "convnet": (lambda: ConvNet(ConvNetConfig(3, 16, 10, 8, 2)), (4, 3, 16, 16)),
}


def data_for(name: str) -> tuple[Any, Any]:
    rng, shape = np.random.default_rng(0), MODELS[name][1]
    if name == "gpt":
        return rng.integers(0, 96, shape), rng.integers(0, 96, shape)
    return rng.standard_normal(shape), rng.integers(0, 10, shape[0])


@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_on_the_cpu(name: str) -> None:
    def run(device: str) -> list[Any]:
        model = MODELS[name][0]().materialize(seed=0, dtype="float64", device=device)
        x, y = (to_device(a, device) for a in data_for(name))
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model.zero_grad()
            (model.loss(model(Tensor(x) if x.dtype.kind == "f" else x), y) / y.size).backward()
            optim.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return [p.data for p in model.parameters()]

    for got, want in zip(run("cuda"), run("cpu"), strict=True):
        compare(got, want, 1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_a_float16_step_with_a_loss_scale_is_the_cpus(name: str) -> None:
    """One step, and one that overflows: both devices skip it.

    Rounding flips ReLUs of the ConvNet, so that the CPU's own float16 gradients are 0.1 from the exact ones there: each
    device is compared with float64, and the GPU may be twice as far from it as the CPU.
    """

    def run(device: str, amp: bool) -> tuple[list[Any], list[Any], float]:
        dtype = "float32" if amp else "float64"
        model = MODELS[name][0]().materialize(seed=0, dtype=dtype, device=device)
        x, y = (to_device(a, device) for a in data_for(name))
        x = x.astype(dtype) if x.dtype.kind == "f" else x
        optimizer, scaler = optim.SGD(model.parameters(), lr=0.1), GradScaler(1024.0)
        gradients: list[Any] = []
        for scale in (1024.0, 2.0**40)[: 1 + amp]:
            scaler.update(scale)
            model.zero_grad()
            with autocast("float16", enabled=amp):
                loss = model.loss(model(Tensor(x) if x.dtype.kind == "f" else x), y) / y.size
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            gradients += [np.array(to_host(p.grad)) for p in model.parameters()] if scale == 1024.0 else []
            scaler.step(optimizer)
            scaler.update()
        return gradients, [to_host(p.data) for p in model.parameters()], scaler.get_scale()

    exact, exact_weights, _ = run("cpu", amp=False)
    largest = max(float(np.abs(g).max()) for g in exact)
    off: dict[str, list[float]] = {}
    for device in ("cpu", "cuda"):
        with np.errstate(over="ignore", invalid="ignore"):
            gradients, weights, scale = run(device, amp=True)
        assert scale == 2.0**39 and all(x.dtype == np.float32 for x in [*gradients, *weights])
        pairs = [*zip(gradients, exact, strict=True), *zip(weights, exact_weights, strict=True)]
        off[device] = [relative_error(got, want, want, largest) for got, want in pairs]
    assert max(off["cuda"]) <= max(VERIFIED["fp16"], 2 * max(off["cpu"])), off


@pytest.mark.parametrize("name", MODELS)
def test_a_captured_step_waits_for_nothing_and_computes_the_same(name: str) -> None:
    """A value read back to the host would break the capture off."""
    from minipar.kernels.gpu_graph import CapturedStep

    model = MODELS[name][0]().materialize(seed=0, dtype="float32", device="cuda")
    x, y = (to_device(a, "cuda") for a in data_for(name))
    x = x.astype("float32") if x.dtype.kind == "f" else x

    def gradients() -> Any:
        model.zero_grad()
        loss = model.loss(model(Tensor(x) if x.dtype.kind == "f" else x), y) / y.size
        loss.backward()
        return loss.data

    want = [to_host(gradients()), *(to_host(p.grad) for p in model.parameters())]
    step = CapturedStep(gradients)
    for p in model.parameters():
        p.grad[...] = 0  # to be written again
    loss = step()  # what reads it waits for the graph
    for got, expected in zip([loss, *(p.grad for p in model.parameters())], want, strict=True):
        compare(got, expected, 1e-4)


def test_indices_out_of_range_are_nan_not_numbers() -> None:
    xp = device_module("cuda")
    losses, _ = gpu.cross_entropy(xp.ones((3, 4), "float32"), xp.array([1, 4, -1]))
    assert np.isnan(to_host(losses)).tolist() == [False, True, True]
    rows = to_host(gpu.embedding(xp.ones((3, 2), "float32"), xp.array([2, 3])))
    assert np.isnan(rows).tolist() == [[False, False], [True, True]]


def test_half_precision_products_add_up_in_float32() -> None:
    """Ones and a term that float16 sums would lose: 4096 + 2 is 4096 there."""
    x, w = (to_device(np.ones((n, 4098), np.float16), "cuda") for n in (16, 8))
    assert (to_host(gpu.linear(x, w)) == np.float16(4098)).all()
    stack = to_device(np.ones((3, 16, 4098), np.float16), "cuda")
    assert (to_host(gpu_blas.matmul(stack, stack.swapaxes(-1, -2))) == np.float16(4098)).all()


@pytest.mark.parametrize("aligned", (False, True))
@pytest.mark.parametrize("dtype", ("float16", "float32", "float64"))
@pytest.mark.parametrize("name", PAIRS)
def test_products_of_every_layout(name: str, dtype: str, aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if aligned:  # also these small ones, and float32 as if for tensor cores
        monkeypatch.setenv("CUPY_TF32", "1")
        monkeypatch.setattr(gpu_blas, "LARGE", 1)
        monkeypatch.setattr(gpu_blas, "WIDE", 1)
    a, b = (x.astype(dtype, order="K") for x in PAIRS[name])
    want = a.astype(float) @ b.astype(float)
    tolerance = {"float16": 2e-3, "float32": 2e-3 if aligned else 1e-5, "float64": 1e-13}[dtype]
    compare(gpu_blas.matmul(on_device(a), on_device(b)), want, tolerance)
    if b.ndim > 1:
        columns_first = on_device(np.ascontiguousarray(b.swapaxes(-1, -2))).swapaxes(-1, -2)
        compare(gpu_blas.matmul(on_device(a), columns_first), want, tolerance)


@pytest.mark.parametrize("columns", (1, 3, 4, 8, 24))
@pytest.mark.parametrize("dtype", ("float16", "float32", "float64"))
def test_copies_in_wide_pieces_are_copies(dtype: str, columns: int) -> None:
    xp = device_module("cuda")
    values = np.arange(2 * 3 * 5 * 40, dtype=dtype).reshape(2, 5, 3, 40)
    for first in (0, 1, 4, 8):
        x = on_device(values)[..., first : first + columns].swapaxes(1, 2)  # heads of a fused projection
        want = values[..., first : first + columns].swapaxes(1, 2)
        assert np.array_equal(to_host(contiguous(x)), want)
        out = xp.zeros((2, 5, 3, 40), dtype)
        copy(x, out[..., first : first + columns].swapaxes(1, 2))
        assert np.array_equal(to_host(out)[..., first : first + columns].swapaxes(1, 2), want)
        assert to_host(out).sum(dtype=float) == want.sum(dtype=float), "nothing else is written"


@pytest.mark.parametrize("rows", (1, 5, 64, 65, 1000))
@pytest.mark.parametrize("columns", (3, 129))
def test_sums_over_rows_and_copies_of_rows_to_another_width(rows: int, columns: int) -> None:
    values = np.random.default_rng(0).standard_normal((rows, columns)).astype("float32")
    wider, back = (device_module("cuda").empty((rows, n), "float32") for n in (columns + 5, columns))
    copy_rows(on_device(values), wider)
    assert np.array_equal(to_host(wider), np.pad(values, ((0, 0), (0, 5))))
    copy_rows(wider, back)
    assert np.array_equal(to_host(back), values)
    compare(gpu.linear_backward_bias(back), values.astype(float).sum(0), 1e-6)
