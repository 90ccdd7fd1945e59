"""Autocast and GradScaler beside torch.amp: dtypes of operations, gradients, and the scaler's every move."""

from typing import Any

import numpy as np
import pytest

from minipar import nn, ops, optim
from minipar.amp import GradScaler, autocast
from minipar.tensor import Tensor

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install 'minipar[parity]'")

LOW = ("float16", "bfloat16")
IDS = np.array([0, 2])


def inputs(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.uniform(0.5, 1.5, shape).astype("float32") for shape in shapes]


# Operations on which the CPU lists of torch.autocast and its CUDA lists agree; softmax, norms, exp, log, pow
# and sum are on the CUDA list only (on a CPU their kernels compute in float32 inside), and ours follow that.
CASES: dict[str, tuple[list[tuple[int, ...]], Any, Any]] = {
    "linear": ([(2, 3), (4, 3), (4,)], ops.linear, torch.nn.functional.linear),
    "matmul": ([(2, 3), (3, 4)], ops.matmul, torch.matmul),
    "conv2d": ([(1, 2, 4, 4), (3, 2, 3, 3)], ops.conv2d, torch.nn.functional.conv2d),
    "einsum": (
        [(2, 3), (3, 4)],
        lambda a, b: ops.einsum("ij,jk->ik", a, b),
        lambda a, b: torch.einsum("ij,jk->ik", a, b),
    ),
    "attention": (
        [(1, 3, 4)] * 3,
        ops.scaled_dot_product_attention,
        torch.nn.functional.scaled_dot_product_attention,
    ),
    "mse_loss": ([(2, 3), (2, 3)], ops.mse_loss, torch.nn.functional.mse_loss),
    "cross_entropy": (
        [(2, 3)],
        lambda x: ops.cross_entropy(x, IDS),
        lambda x: torch.nn.functional.cross_entropy(x, torch.from_numpy(IDS)),
    ),
    "prod": ([(2, 3)], ops.prod, torch.prod),
    "embedding": (
        [(4, 3)],
        lambda w: ops.embedding(w, IDS),
        lambda w: torch.nn.functional.embedding(torch.from_numpy(IDS), w),
    ),
    "add": ([(2, 3), (2, 3)], ops.add, torch.add),
    "gelu": ([(2, 3)], ops.gelu, torch.nn.functional.gelu),
    "relu": ([(2, 3)], ops.relu, torch.relu),
}


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("name", CASES)
def test_dtypes_are_those_of_torch_autocast(name: str, low: str) -> None:
    shapes, ours, theirs = CASES[name]
    arrays = inputs(*shapes)
    a = [Tensor(x, requires_grad=True) for x in arrays]
    b = [torch.from_numpy(x.copy()).requires_grad_() for x in arrays]
    with autocast(low):
        y = ours(*a)
    with torch.autocast("cpu", dtype=getattr(torch, low)):
        z = theirs(*b)
    assert f"torch.{y.dtype.name}" == str(z.dtype)
    y.backward(np.ones(y.shape, y.dtype))
    z.backward(torch.ones_like(z))
    for ours_, theirs_ in zip(a, b):
        assert ours_.grad is not None and f"torch.{ours_.grad.dtype.name}" == str(theirs_.grad.dtype)
        np.testing.assert_allclose(ours_.grad, theirs_.grad.numpy(), rtol=0.03, atol=0.02)


def test_a_float16_operand_and_a_float32_one_meet_as_in_torch() -> None:
    a, b = inputs((2, 3), (2, 3))
    with autocast():
        y = Tensor(a.astype("float16")) * Tensor(b)
    with torch.autocast("cpu", dtype=torch.float16):
        z = torch.from_numpy(a.astype("float16")) * torch.from_numpy(b)
    assert (y.dtype, z.dtype) == (np.float32, torch.float32)


@pytest.mark.parametrize("low", LOW)
def test_gradients_of_an_mlp_are_torchs(low: str) -> None:
    x, w1, w2 = inputs((16, 8), (32, 8), (4, 32))
    x, w1, w2 = x - 1, (w1 - 1) / 4, (w2 - 1) / 4
    targets = np.arange(16) % 4
    a, b = nn.Linear(8, 32, bias=False).materialize(0), nn.Linear(32, 4, bias=False).materialize(0)
    a.weight.assign_(w1)
    b.weight.assign_(w2)
    with autocast(low):
        loss = ops.cross_entropy(b(ops.gelu(a(Tensor(x)), "none")), targets)
    (loss * 1024.0).backward()
    tw1, tw2 = (torch.from_numpy(w.copy()).requires_grad_() for w in (w1, w2))
    with torch.autocast("cpu", dtype=getattr(torch, low)):
        h = torch.nn.functional.gelu(torch.from_numpy(x) @ tw1.T) @ tw2.T
        expected = torch.nn.functional.cross_entropy(h, torch.from_numpy(targets))
    (expected * 1024.0).backward()
    eps = 2.0**-10 if low == "float16" else 2.0**-7
    assert loss.item() == pytest.approx(expected.item(), rel=4 * eps)
    for ours, theirs in ((a.weight.grad, tw1.grad), (b.weight.grad, tw2.grad)):
        theirs = theirs.numpy()
        assert ours.dtype == theirs.dtype == np.float32
        assert np.abs(ours - theirs).max() <= 8 * eps * np.abs(theirs).max()


@pytest.mark.parametrize("explicit_unscale", (False, True))
def test_the_scaler_makes_torchs_every_move(explicit_unscale: bool) -> None:
    options = {"init_scale": 2.0**16, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3}
    w = Tensor(np.ones(3, "float32"), requires_grad=True)
    tw = torch.ones(3, requires_grad=True)
    pairs = [
        (GradScaler(**options), optim.AdamW([w], lr=0.1), w, lambda t, g: setattr(t, "grad", g.copy())),
        (
            torch.amp.GradScaler("cpu", **options),
            torch.optim.AdamW([tw], lr=0.1),
            tw,
            lambda t, g: setattr(t, "grad", torch.from_numpy(g.copy())),
        ),
    ]
    for theirs in (pairs[1][0],):  # PyTorch makes its scale with the first loss
        theirs.scale(torch.ones(()))
    rng = np.random.default_rng(0)
    for step, kind in enumerate("ooxoooooonxxoooooo"):
        g = rng.standard_normal(3).astype("float32")
        if kind != "o":
            g[step % 3] = {"x": np.inf, "n": np.nan}[kind]
        seen = []
        for scaler, optimizer, t, give in pairs:
            give(t, g * np.float32(scaler.get_scale()))
            if explicit_unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            state = scaler.state_dict()
            seen.append((scaler.get_scale(), state["_growth_tracker"]))
        assert seen[0] == seen[1], step
        np.testing.assert_allclose(w.data, tw.detach().numpy(), rtol=1e-6)
    loaded = GradScaler()
    loaded.load_state_dict(pairs[1][0].state_dict())
    assert loaded.get_scale() == pairs[0][0].get_scale()


@pytest.mark.parametrize(
    "calls", (("update",), ("unscale_", "unscale_"), ("step", "unscale_"), ("step", "step"))
)
def test_misuse_raises_the_same_errors(calls: tuple[str, ...]) -> None:
    w = Tensor(np.ones(3, "float32"), requires_grad=True)
    w.grad = np.ones(3, "float32")
    tw = torch.ones(3, requires_grad=True)
    tw.grad = torch.ones(3)
    messages = []
    for scaler, optimizer in (
        (GradScaler(), optim.SGD([w], lr=0.1)),
        (torch.amp.GradScaler("cpu"), torch.optim.SGD([tw], lr=0.1)),
    ):
        if isinstance(optimizer, torch.optim.Optimizer):
            scaler.scale(torch.ones(()))
        with pytest.raises((RuntimeError, AssertionError)) as error:
            for call in calls:
                getattr(scaler, call)(*(() if call == "update" else (optimizer,)))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
