"""The fast kernels of activations, norms, softmax, attention and linear layers against their plain formulas.

Every precision; strided, broadcast, odd-shaped and empty arrays.
"""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest

from minipar import kernels
from minipar.kernels import cpu, plain
from tests.kernel_checks import DOUBLE, EVERY_DTYPE, HALF, SINGLE, TOLERANCE, check, make


def test_both_sets_have_the_same_names_and_signatures():
    assert sorted(cpu.__all__) == sorted(plain.__all__)
    for name in plain.__all__:
        ours, theirs = (list(inspect.signature(getattr(m, name)).parameters) for m in (cpu, plain))
        assert ours == [p for p in theirs if p != "xp"], name


def test_of_gives_the_kernels_of_the_device():
    assert kernels.of(np.ones(3)) is cpu


# ---- activations, norms, softmax -----------------------------------------------------------------------


@EVERY_DTYPE
@pytest.mark.parametrize("form", ["tanh", "none"])
@pytest.mark.parametrize("shape", [(), (0, 4), (7, 3), (3, 70_001)])
def test_gelu(dtype, form, shape):
    x, g = make(*shape, dtype=dtype, scale=3), make(*shape, dtype=dtype, seed=1)
    y = check("gelu", x, approximate=form)
    check("gelu_backward", g, x, y, approximate=form)
    if len(shape) == 2:
        y = check("gelu", x.T, approximate=form)
        check("gelu_backward", g.T, x.T, y, approximate=form)


@EVERY_DTYPE
@pytest.mark.parametrize("form", ["tanh", "none"])
def test_gelu_far_out_and_near_zero(dtype, form):
    """Where exp overflows, and where y / x says nothing: at zero and where numbers lose their precision."""
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([0.0, -0.0, tiny, -tiny, 1e-3, -1e-3, 5, -5, 9.5, -9.5, 50, -50, 6e4, -6e4], dtype)
    y = check("gelu", x, approximate=form)
    check("gelu_backward", np.ones_like(x), x, y, approximate=form)


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 4, 33), (700, 257)])
@pytest.mark.parametrize("affine", [True, False])
def test_norms(dtype, shape, affine):
    x, g = make(*shape, dtype=dtype) + dtype(2), make(*shape, dtype=dtype, seed=1)
    w, b = (make(shape[-1], dtype=dtype, seed=s) if affine else None for s in (2, 3))
    _, mean, rstd = check("layer_norm", x, w, b, 1e-5)
    loose = None if dtype is not HALF else 1e-2  # gradients of float16 sums, relative to their largest
    check("layer_norm_backward", g, x, mean, rstd, w, tolerance=loose)
    _, rstd = check("rms_norm", x, w, 1e-5)
    check("rms_norm_backward", g, x, rstd, w, tolerance=loose)


@EVERY_DTYPE
@pytest.mark.parametrize(("shape", "groups"), [((0, 4, 3), 2), ((2, 4, 5, 3), 2), ((3, 6, 7), 1), ((70, 8, 33, 17), 8)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(dtype, shape, groups, affine):
    x, g = make(*shape, dtype=dtype) + dtype(2), make(*shape, dtype=dtype, seed=1)
    w, b = (make(shape[1], dtype=dtype, seed=s) if affine else None for s in (2, 3))
    _, mean, rstd = check("group_norm", x, groups, w, b, 1e-5)
    loose = None if dtype is not HALF else 1e-2  # gradients of float16 sums, relative to their largest
    check("group_norm_backward", g, x, mean, rstd, w, tolerance=loose)


def test_group_norm_takes_strided_and_broadcast_arrays():
    x, g = make(3, 5, 4, 6).transpose(0, 2, 1, 3), np.broadcast_to(make(3, 4, 1, 1, seed=1), (3, 4, 5, 6))
    _, mean, rstd = check("group_norm", x, 2, make(4, seed=2), None, 1e-5)
    check("group_norm_backward", g, x, mean, rstd, make(4, seed=2))


def test_norms_take_strided_and_broadcast_arrays():
    x, w = make(6, 9, 4).transpose(2, 0, 1), make(9, seed=1)
    g = np.broadcast_to(np.ones(1), x.shape)
    _, mean, rstd = check("layer_norm", x, w, None, 1e-5)
    check("layer_norm_backward", g, x, mean, rstd, w)
    check("rms_norm_backward", g, x, check("rms_norm", x, w, 1e-5)[1], w)


def test_gradients_of_norms_have_their_parameters_dtype():
    """Parameters in float32 under activations in float64; `check` compares dtypes with the plain formula's."""
    x, g, w = make(4, 5, dtype=DOUBLE), make(4, 5, dtype=DOUBLE, seed=1), make(5, dtype=SINGLE, seed=2)
    _, mean, rstd = cpu.layer_norm(x, w, w, 1e-5)
    check("layer_norm_backward", g, x, mean, rstd, w)


def test_layer_norm_keeps_precision_under_a_large_mean():
    x = make(8, 256, dtype=SINGLE) + SINGLE(1000)
    y, _, _ = cpu.layer_norm(x, None, None, 1e-5)
    want = plain.layer_norm(x.astype(DOUBLE), None, None, 1e-5)[0]
    assert np.abs(y - want).max() < 2e-3  # E[x²] - E[x]² would be off by more than 1


@EVERY_DTYPE
@pytest.mark.parametrize("shape, axis", [((5,), 0), ((0, 3), 1), ((3, 0), 1), ((4, 3, 7), 1), ((900, 301), -1)])
def test_softmax(dtype, shape, axis):
    x, g = make(*shape, dtype=dtype, scale=4), make(*shape, dtype=dtype, seed=1)
    check("softmax_backward", g, check("softmax", x, axis), axis)
    check("log_softmax_backward", g, check("log_softmax", x, axis), axis)


def test_softmax_of_huge_and_of_no_logits():
    x = np.array([[1e4, -1e4, 1e4 - 1], [-1e4, -1e4, -1e4], [-np.inf, -np.inf, -np.inf]], SINGLE)
    check("softmax", x[:2], -1)
    check("softmax", x[:1, ::2], -1)
    y = check("softmax", x, -1)
    assert y[1].tolist() == pytest.approx([1 / 3] * 3) and y[2].tolist() == [0, 0, 0]
    log = cpu.log_softmax(x, -1)
    assert log[0, 2] == pytest.approx(-1.313262, abs=1e-5) and np.isneginf(log[2]).all()
    assert np.isnan(cpu.softmax(np.array([[np.nan, 1.0]]), -1)).all()


@EVERY_DTYPE
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count, width", [(0, 4), (5, 3), (1500, 301)])
def test_cross_entropy(dtype, smoothing, count, width):
    logits, g = make(count, width, dtype=dtype, scale=3), make(count, dtype=dtype, seed=1)
    targets = np.random.default_rng(0).integers(0, width, count)
    targets[::4] = -7
    losses, saved = check("cross_entropy", logits, targets, ignore_index=-7, label_smoothing=smoothing)
    d = check("cross_entropy_backward", g, logits, targets, saved, ignore_index=-7, label_smoothing=smoothing)
    assert not losses[::4].any() and not d[::4].any()


def test_cross_entropy_of_huge_logits_is_exact():
    logits = np.array([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4 + 2, -1e4]], SINGLE)
    losses, saved = cpu.cross_entropy(logits, np.array([1, 0]))
    p = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    assert losses[0] == pytest.approx(-math.log(p[1]), rel=1e-6)
    assert losses[1] == pytest.approx(math.log(2 + math.exp(2)), rel=1e-6)
    d = cpu.cross_entropy_backward(np.ones(2, SINGLE), logits, np.array([1, 0]), saved)
    assert d[0].tolist() == pytest.approx([p[0], p[1] - 1, 0], abs=1e-6)


def test_an_ignored_row_of_nan_leaves_loss_and_gradient_clean():
    logits = np.array([[np.nan, np.nan], [1.0, 2.0]])
    losses, saved = cpu.cross_entropy(logits, np.array([-100, 1]))
    d = cpu.cross_entropy_backward(np.ones(2), logits, np.array([-100, 1]), saved)
    assert losses[0] == 0 and not d[0].any() and np.isfinite(d).all()


@pytest.mark.parametrize("module", [cpu, plain])
@pytest.mark.parametrize("bad", [3, -1])
def test_a_target_or_id_out_of_range_is_named(module, bad):
    with pytest.raises(ValueError, match=rf"targets holds {bad}, which is outside 0\.\.2"):
        module.cross_entropy(make(2, 3), np.array([0, bad]))
    with pytest.raises(ValueError, match=rf"ids holds {bad}, which is outside 0\.\.2"):
        module.embedding(make(3, 2), np.array([[0, bad]]))
    with pytest.raises(ValueError, match="targets must be integers"):
        module.cross_entropy(make(2, 3), np.array([0.0, 1.0]))


# ---- attention -----------------------------------------------------------------------------------------


def fused_heads(b, t, h, d, dtype):
    """q, k, v as views of one (B, T, 3, H, D) projection, transposed to (B, H, T, D)."""
    qkv = make(b, t, 3, h, d, dtype=dtype)
    return [qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3)]


@EVERY_DTYPE
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("b, t, h, d", [(2, 1, 1, 3), (0, 4, 2, 3), (2, 0, 2, 3), (3, 130, 5, 8), (2, 600, 2, 4)])
def test_attention_on_fused_projections(dtype, causal, b, t, h, d):
    q, k, v = fused_heads(b, t, h, d, dtype)
    g = make(b, t, h, d, dtype=dtype, seed=1).transpose(0, 2, 1, 3)
    _, probs = check("attention", q, k, v, causal=causal)
    plain_probs = probs if dtype is HALF else plain.attention(q, k, v, causal=causal)[1]
    check("attention_backward", g, q, k, v, plain_probs, causal=causal)
    merged = np.full((b, t, h, d), np.nan, dtype)
    y, _ = cpu.attention(q, k, v, causal=causal, out=merged.transpose(0, 2, 1, 3))
    assert np.shares_memory(y, merged) or not merged.size
    np.testing.assert_array_equal(merged.transpose(0, 2, 1, 3), cpu.attention(q, k, v, causal=causal)[0])
    dqkv = np.full((b, t, 3, h, d), np.nan, dtype)
    into = tuple(dqkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    cpu.attention_backward(g, q, k, v, plain_probs, None, into, causal)
    for got, want in zip(into, cpu.attention_backward(g, q, k, v, plain_probs)):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("tq, tk", [(5, 9), (9, 5), (100, 70), (70, 100)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_uneven_lengths_and_masks(lead, tq, tk, causal):
    q, k, v = make(*lead, tq, 4), make(*lead, tk, 4, seed=1), make(*lead, tk, 6, seed=2)
    g = make(*lead, tq, 6, seed=3)
    boolean = np.random.default_rng(0).random((tq, tk)) < 0.6
    boolean[1] = False  # a query that may attend to nothing
    for mask in (None, boolean, np.where(boolean, 0.5, -np.inf), make(*lead, 1, tk)):
        for scale in (None, 40.0):  # 40: beyond the scores that exp takes without a row maximum
            y, probs = check("attention", q, k, v, mask=mask, causal=causal, scale=scale)
            check("attention_backward", g, q, k, v, probs, scale=scale, causal=causal)
            if mask is boolean:
                assert not y[..., 1, :].any() and not probs[..., 1, :].any()


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_huge_scores_is_exact(causal):
    q, k, v = (make(2, 70, 4, dtype=SINGLE, seed=s, scale=100) for s in range(3))  # scores of about ±1e4
    y, probs = cpu.attention(q, k, v, causal=causal)
    want = plain.attention(*(x.astype(DOUBLE) for x in (q, k, v)), causal=causal)
    assert np.isfinite(y).all() and np.abs(probs - want[1]).max() < 2e-2  # scores are rounded to 1e-3
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)


def test_attention_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"attention needs q .* but got q \(2, 3, 4\), k \(2, 5, 3\)"):
        cpu.attention(make(2, 3, 4), make(2, 5, 3), make(2, 5, 3))


# ---- linear, embedding ---------------------------------------------------------------------------------


@EVERY_DTYPE
@pytest.mark.parametrize("lead", [(), (0,), (7,), (3, 50)])
def test_linear(dtype, lead):
    x, w, b = make(*lead, 5, dtype=dtype), make(4, 5, dtype=dtype, seed=1), make(4, dtype=dtype, seed=2)
    g = make(*lead, 4, dtype=dtype, seed=3)
    check("linear", x, w, b)
    check("linear", x, w, None)
    check("linear_backward_input", g, w)
    dweight = check("linear_backward_weight", g, x)
    for form in (cpu, plain):
        out = np.full(w.shape, np.nan, dtype)
        assert form.linear_backward_weight(g, x, out) is out
        np.testing.assert_allclose(out, dweight, rtol=8 * np.finfo(dtype).eps)
    check("linear_backward_bias", g)
    y = g.copy()
    assert cpu.bias_add_(y, b) is y
    np.testing.assert_array_equal(y, g + b)


def test_linear_takes_strided_and_broadcast_arrays():
    x, w = make(5, 6, 8).transpose(2, 1, 0)[:, ::2], make(10, 4)[::2].T
    g = np.broadcast_to(np.ones(1), (8, 3, 4))
    check("linear", x, w, None)
    check("linear_backward_input", g, w)
    check("linear_backward_weight", g, x)
    check("linear_backward_bias", g)


def test_float16_products_accumulate_in_float32():
    x, w = np.full((1, 4096), 1, HALF), np.full((1, 4096), 1, HALF)
    assert cpu.linear(x, w, None)[0, 0] == 4096  # a float16 sum of ones stops at 2048
    assert cpu.linear_backward_bias(x.T)[0] == 4096


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(), (0,), (9,), (4, 60)])
def test_embedding(dtype, shape):
    w, ids = make(11, 3, dtype=dtype), np.random.default_rng(0).integers(0, 11, shape)
    check("embedding", w, ids)
    loose = 1e-2 if dtype is HALF else None
    check("embedding_backward", make(*shape, 3, dtype=dtype, seed=1), ids, 11, tolerance=loose)
