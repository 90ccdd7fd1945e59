"""The gradient scaler alone: its state machine, what it refuses, and what it is for."""

import numpy as np
import pytest

from minipar import ops, optim
from minipar.amp import GradScaler, autocast
from minipar.errors import UsageError
from minipar.nn import Linear
from minipar.tensor import Tensor


def weight() -> Tensor:
    return Tensor(np.ones(3, "float32"), requires_grad=True)


def trace(scaler: GradScaler, script: str) -> list[float]:
    """Take a step for each letter, o good, x overflowed; return the scale after each."""
    w = weight()
    optimizer, scales = optim.SGD([w], lr=0.1), []
    for letter in script:
        w.grad = np.full(3, scaler.get_scale() if letter == "o" else np.inf, "float32")
        before = w.data.copy()
        scaler.step(optimizer)
        moved = not np.array_equal(w.data, before)
        assert moved == (letter == "o")
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_defaults_are_pytorchs():
    s = GradScaler()
    assert (s.get_scale(), s.growth_factor, s.backoff_factor, s.growth_interval) == (2.0**16, 2.0, 0.5, 2000)
    assert s.is_enabled()


@pytest.mark.parametrize(
    ("options", "script", "expected"),
    [
        # growth after three good steps in a row; an overflow starts the count anew
        ({}, "ooo" "oox" "ooo" "x" "x", [16, 16, 32, 32, 32, 16, 16, 16, 32, 16, 8]),
        ({"growth_factor": 4.0, "backoff_factor": 0.25}, "oooxx", [16, 16, 64, 16, 4]),
        # with hysteresis 2 the first overflow is forgiven, later ones are not until the scale has grown
        ({"hysteresis": 2}, "xoxxooo" "xx", [16, 16, 8, 4, 4, 4, 8, 8, 4]),
        ({"floor": 4.0}, "xxxxooo", [8, 4, 4, 4, 4, 4, 8]),
        ({"init_scale": 2.0**127}, "ooo", [2.0**127] * 3),  # no growth beyond float32
    ],
)  # fmt: skip
def test_a_scripted_sequence_gives_the_state_machines_trace(options, script, expected):
    scaler = GradScaler(**{"init_scale": 16.0, "growth_interval": 3, **options})
    assert trace(scaler, script) == expected


def test_the_default_doubles_after_2000_good_steps():
    assert trace(GradScaler(), "o" * 2001)[1998:] == [2.0**16, 2.0**17, 2.0**17]


def test_a_skipped_step_leaves_weights_moments_and_step_count():
    w = weight()
    optimizer, scaler = optim.AdamW([w], lr=0.1), GradScaler(4.0)
    w.grad = np.full(3, 4.0, "float32")
    assert scaler.step(optimizer) is None and optimizer.state[0]["step"] == 1
    scaler.update()
    before = {k: np.copy(v) for k, v in optimizer.state[0].items()} | {
        "w": w.data.copy(),
        "version": w.version,
    }
    w.grad = np.array([1.0, np.nan, 1.0], "float32")
    scaler.step(optimizer)
    scaler.update()
    after = {**optimizer.state[0], "w": w.data, "version": w.version}
    assert all(np.array_equal(before[k], after[k]) for k in before)
    assert scaler.get_scale() == 2.0


def test_unscaling_comes_before_clipping_and_happens_once():
    w = weight()
    optimizer, scaler = optim.SGD([w], lr=1.0), GradScaler(1024.0)
    w.grad = np.array([3.0, 0, 4.0], "float32") * 1024
    scaler.unscale_(optimizer)
    np.testing.assert_array_equal(w.grad, [3, 0, 4])
    assert optim.clip_grad_norm_([w], 1.0) == pytest.approx(5)
    scaler.step(optimizer)
    np.testing.assert_allclose(w.data, [0.4, 1, 0.2], rtol=1e-5)


def test_misuse_is_refused_in_pytorchs_words():
    w = weight()
    optimizer, scaler = optim.SGD([w], lr=1.0), GradScaler()
    with pytest.raises(RuntimeError, match="No inf checks were recorded prior to update"):
        scaler.update()
    w.grad = np.ones(3, "float32")
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called on this optimizer since the last update"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="unscale_\\(\\) is being called after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="step\\(\\) has already been called"):
        scaler.step(optimizer)


def test_float16_gradients_are_refused():
    w = Tensor(np.ones(3, "float16"), requires_grad=True)
    w.grad = np.ones(3, "float16")
    with pytest.raises(UsageError, match=r"gradient is float16.*keep parameters float32"):
        GradScaler().unscale_(optim.SGD([w], lr=1.0))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"growth_factor": 1.0}, "growth_factor = 1.0"),
        ({"backoff_factor": 1.0}, "backoff_factor = 1.0"),
        ({"growth_interval": 0}, "growth_interval = 0"),
        ({"hysteresis": 0}, "hysteresis = 0"),
        ({"init_scale": 2.0, "floor": 4.0}, "floor = 4.0"),
        ({"init_scale": 0.0}, "init_scale = 0.0"),
        ({"init_scale": "cuda"}, "'cuda' is PyTorch's device, .*: the first argument is init_scale"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(UsageError, match=named):
        GradScaler(**options)


def test_factors_and_interval_are_set_and_read_under_pytorchs_names():
    scaler = GradScaler(16.0)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (2.0, 0.5, 2000)
    assert trace(scaler, "oo") == [16, 16]
    scaler.set_growth_factor(4.0)
    scaler.set_backoff_factor(0.25)
    scaler.set_growth_interval(2)  # already reached: the next good step counts
    assert trace(scaler, "ox" "oo") == [64, 16, 16, 64]
    for name, value in (("growth_factor", 1), ("backoff_factor", 0), ("growth_interval", 0)):
        with pytest.raises(UsageError, match=f"{name} = {value} must"):
            getattr(scaler, f"set_{name}")(value)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (4.0, 0.25, 2)


def test_state_goes_through_a_dictionary():
    a = GradScaler(16.0, growth_interval=3, hysteresis=2, floor=1.0)
    trace(a, "oox")
    b = GradScaler()
    b.load_state_dict(a.state_dict())
    script = "oxxooooo"
    assert trace(a, script) == trace(b, script)
    with pytest.raises(UsageError, match=r"missing \['scale'\], unknown \['size'\]"):
        state = {k: v for k, v in a.state_dict().items() if k != "scale"}
        b.load_state_dict({**state, "size": 1})


def test_not_enabled_passes_everything_through():
    w = weight()
    scaler, optimizer = GradScaler(enabled=False), optim.SGD([w], lr=1.0)
    loss = (w * 2).sum()
    assert scaler.scale(loss) is loss and scaler.get_scale() == 1.0 and scaler.state_dict() == {}
    w.grad = np.array([1, np.inf, 0], "float32")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert w.data[0] == 0


def test_a_gradient_of_1e_8_vanishes_unscaled_and_survives_scaled():
    """The loss is 1e-8 · y: below half of float16's smallest number, 2^-24 ≈ 6e-8."""
    found = {}
    for scaled in (False, True):
        layer, scaler = Linear(1, 1, bias=False).materialize(0), GradScaler(enabled=scaled)
        with autocast():
            y = layer(Tensor(np.ones((1, 1), "float32")))
            loss = ops.astype(y, "float32").sum() * 1e-8
        scaler.scale(loss).backward()
        scaler.unscale_(optim.SGD(layer.parameters(), lr=1.0))
        assert layer.weight.dtype == layer.weight.grad.dtype == np.float32
        found[scaled] = layer.weight.grad.item()
    assert found[False] == 0.0
    assert found[True] == pytest.approx(1e-8, rel=1e-3)


def test_an_overflowing_backward_is_found():
    layer, scaler = Linear(1, 1, bias=False).materialize(0), GradScaler(2.0**20)
    optimizer = optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.data.copy()
    with np.errstate(over="ignore"):
        with autocast():
            loss = layer(Tensor(np.ones((1, 1), "float32"))).sum()
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**19
    np.testing.assert_array_equal(layer.weight.data, before)
