"""The fast kernels against PyTorch's own operations, forward and backward, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from minipar.kernels import cpu
from tests.kernel_checks import make

torch = pytest.importorskip("torch", reason="parity tests need PyTorch: pip install 'minipar[parity]'")
F = torch.nn.functional
pytestmark = pytest.mark.parity


def tensors(*arrays):
    return [torch.from_numpy(a.copy()).requires_grad_(a.dtype.kind == "f") for a in arrays]


def same(got, want, tolerance=1e-12):
    for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,)):
        b = b.detach().numpy()
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max(initial=0)))


def gradients(y, g, *inputs):
    return torch.autograd.grad(y, inputs, torch.from_numpy(np.ascontiguousarray(g)))


@pytest.mark.parametrize("form", ["tanh", "none"])
def test_gelu(form):
    x, g = make(40, 30, scale=3), make(40, 30, seed=1)
    (tx,) = tensors(x)
    y = F.gelu(tx, approximate=form)
    same(cpu.gelu(x, form), y)
    same(cpu.gelu_backward(g, x, cpu.gelu(x, form), form), gradients(y, g, tx))


def test_norms():
    x, w, b, g = make(4, 5, 33), make(33, seed=1), make(33, seed=2), make(4, 5, 33, seed=3)
    tx, tw, tb = tensors(x, w, b)
    y, mean, rstd = cpu.layer_norm(x, w, b, 1e-5)
    ty = F.layer_norm(tx, (33,), tw, tb, 1e-5)
    same(y, ty)
    same(cpu.layer_norm_backward(g, x, mean, rstd, w), gradients(ty, g, tx, tw, tb))
    y, rstd = cpu.rms_norm(x, w, 1e-5)
    ty = F.rms_norm(tx, (33,), tw, 1e-5)
    same(y, ty)
    same(cpu.rms_norm_backward(g, x, rstd, w), gradients(ty, g, tx, tw))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax(axis):
    x, g = make(4, 6, 7, scale=5), make(4, 6, 7, seed=1)
    (tx,) = tensors(x)
    for name, operation in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
        y, ty = getattr(cpu, name)(x, axis), operation(tx, axis)
        same(y, ty)
        same(getattr(cpu, f"{name}_backward")(g, y, axis), gradients(ty, g, tx))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy(smoothing):
    logits, targets, g = make(9, 5, scale=4), np.array([0, 4, -100, 2, 1, 3, -100, 0, 2]), make(9, seed=1)
    (tx,) = tensors(logits)
    ty = F.cross_entropy(tx, torch.from_numpy(targets), reduction="none", label_smoothing=smoothing)
    losses, saved = cpu.cross_entropy(logits, targets, label_smoothing=smoothing)
    same(losses, ty)
    same(
        cpu.cross_entropy_backward(g, logits, targets, saved, label_smoothing=smoothing),
        gradients(ty, g, tx),
    )


@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "float"])
def test_attention(kind):
    q, k, v, g = (make(2, 3, 70, 8, seed=s) for s in range(4))
    tq, tk, tv = tensors(q, k, v)
    mask = None
    if kind == "boolean":
        mask = np.random.default_rng(0).random((2, 1, 70, 70)) < 0.7
    elif kind == "float":
        mask = make(70, 70)
    tmask = None if mask is None else torch.from_numpy(mask)
    ty = F.scaled_dot_product_attention(tq, tk, tv, attn_mask=tmask, is_causal=kind == "causal")
    y, probs = cpu.attention(q, k, v, mask, kind == "causal")
    same(y, ty)
    same(cpu.attention_backward(g, q, k, v, probs, causal=kind == "causal"), gradients(ty, g, tq, tk, tv))


def test_attention_is_causal_from_the_top_left():
    q, k, v = make(1, 5, 4), make(1, 9, 4, seed=1), make(1, 9, 4, seed=2)
    want = F.scaled_dot_product_attention(*tensors(q, k, v), is_causal=True)
    same(cpu.attention(q, k, v, causal=True)[0], want)


CONVOLUTIONS = [  # C, O, groups, kernel, stride, padding, dilation
    (3, 5, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (4, 6, 2, (3, 2), (2, 1), (1, 0), (1, 2)),
    (4, 4, 4, (5, 5), (2, 3), (2, 2), (1, 1)),
    (3, 5, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (3, 2, 1, (2, 2), (3, 4), (1, 1), (2, 2)),
]


@pytest.mark.parametrize("c, out, groups, kernel, stride, padding, dilation", CONVOLUTIONS)
def test_conv2d(c, out, groups, kernel, stride, padding, dilation):
    x, w, b = make(3, c, 11, 13), make(out, c // groups, *kernel, seed=1), make(out, seed=2)
    tx, tw, tb = tensors(x, w, b)
    ty = F.conv2d(tx, tw, tb, stride, padding, dilation, groups)
    where = (stride, padding, dilation, groups)
    y = cpu.conv2d(x, w, b, *where)
    same(y, ty)
    g = make(*y.shape, seed=3)
    got = (
        cpu.conv2d_backward_input(g, w, x.shape, *where),
        cpu.conv2d_backward_weight(g, x, kernel, *where),
        cpu.conv2d_backward_bias(g),
    )
    same(got, gradients(ty, g, tx, tw, tb))


@pytest.mark.parametrize("kernel, stride, padding", [((2, 2), (2, 2), (0, 0)), ((3, 2), (2, 1), (1, 1))])
def test_pools(kernel, stride, padding):
    x = np.maximum(make(3, 2, 8, 9), 0)  # many equal zeros: ties must be broken as PyTorch breaks them
    (tx,) = tensors(x)
    ty = F.max_pool2d(tx, kernel, stride, padding)
    y, saved = cpu.max_pool2d(x, kernel, stride, padding)
    same(y, ty)
    g = make(*y.shape, seed=1)
    same(cpu.max_pool2d_backward(g, saved, x.shape, kernel, stride, padding), gradients(ty, g, tx))
    ty = F.avg_pool2d(tx, kernel, stride, padding)
    same(cpu.avg_pool2d(x, kernel, stride, padding), ty)
    same(cpu.avg_pool2d_backward(g, x.shape, kernel, stride, padding), gradients(ty, g, tx))


def test_im2col_is_unfold():
    x = make(2, 3, 7, 6)
    want = F.unfold(torch.from_numpy(x), (3, 2), dilation=(1, 2), padding=(1, 1), stride=(2, 1))
    same(cpu.im2col(x, (3, 2), (2, 1), (1, 1), (1, 2)), want)


def test_embedding():
    w, ids, g = make(7, 3), np.array([[0, 6, 6], [2, 0, 6]]), make(2, 3, 3, seed=1)
    (tw,) = tensors(w)
    ty = F.embedding(torch.from_numpy(ids), tw)
    same(cpu.embedding(w, ids), ty)
    same(cpu.embedding_backward(g, ids, 7), gradients(ty, g, tw))


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam(decoupled):
    p = make(50)
    (tp,) = tensors(p)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([tp], lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    m, v = np.zeros((2, 50))
    for step in (1, 2, 3):
        g = make(50, seed=step)
        tp.grad = torch.from_numpy(g)
        optimizer.step()
        cpu.adam_step_(p, g, m, v, 1e-2, 0.8, 0.99, 1e-6, 0.1, step, decoupled)
    same(p, tp, 1e-14)


@pytest.mark.parametrize("momentum, dampening, nesterov", [(0, 0, False), (0.9, 0.3, False), (0.9, 0, True)])
def test_sgd(momentum, dampening, nesterov):
    p, buf = make(50), np.zeros(50)
    (tp,) = tensors(p)
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    optimizer = torch.optim.SGD([tp], lr=0.1, weight_decay=0.05, **options)
    for step in (1, 2, 3):
        g = make(50, seed=step)
        tp.grad = torch.from_numpy(g)
        optimizer.step()
        cpu.sgd_step_(p, g, buf if momentum else None, 0.1, momentum, dampening, nesterov, 0.05, step == 1)
    same(p, tp, 1e-14)
