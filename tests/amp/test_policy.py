"""Exponent histograms, and the precision policy: its thresholds, its decisions, its picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minipar import launch, plot, world
from minipar.amp import Decision, ExponentHistogram, PolicyConfig, PrecisionPolicy
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.data import Data, load
from minipar.errors import UsageError
from minipar.nn import Linear, Parameter
from minipar.plot import precision_histograms
from minipar.training import Job
from minipar.verification import Fewer

# ---- histograms ---------------------------------------------------------------------------------------


def test_each_number_is_counted_in_its_power_of_two():
    h = ExponentHistogram().add(np.array([1, 1.99, -2, 0.25, 0, np.inf, np.nan], "float32"))
    counts = {int(e): int(n) for e, n in zip(h.exponents, h.counts) if n}
    assert counts == {0: 2, 1: 1, -2: 1}
    assert (h.nonzero, h.nonfinite, h.largest()) == (4, 2, 1)


@pytest.mark.parametrize("scale", (1.0, 2.0**10, 2.0**16, 1000.0, 2.9))
def test_what_vanishes_and_overflows_is_what_float16_makes_of_it(scale):
    x = (2.0 ** np.random.default_rng(0).uniform(-60, 10, 4000)).astype("float32")
    with np.errstate(over="ignore"):
        low = (x * np.float32(scale)).astype("float16")
    h = ExponentHistogram().add(x)
    # A scale that is no power of two cuts one bin of some 60 of the 4000 numbers: a share of them is estimated.
    exact = scale == 2.0 ** round(np.log2(scale))
    assert h.vanishing(scale) == pytest.approx(np.mean(low == 0), abs=1e-9 if exact else 15 / 4000)
    assert h.overflowing(scale) == pytest.approx(
        np.mean(np.isinf(low)), abs=1e-3 if exact else 15 / 4000
    )  # 65520 … 65536 is left out


def test_a_bin_across_a_limit_counts_in_proportion():
    """2^-26 … 2^-25 vanishes whole, unless it is scaled: by 2^0.25, a quarter of it reaches 2^-25."""
    h = ExponentHistogram().add(np.full(8, 1.5 * 2.0**-26, "float32"))
    assert [h.vanishing(scale) for scale in (1.0, 2.0**0.25, 2.0)] == [1.0, 0.75, 0.0]
    h = ExponentHistogram().add(np.full(8, 1.5 * 2.0**15, "float32"))
    assert [h.overflowing(scale) for scale in (1.0, 2.0**0.25, 2.0)] == [0.0, 0.25, 1.0]


# ---- thresholds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.toml", 'observe = 3\ngradient_underflow = 0.5\nfloat32 = ["h.0.*"]\n'),
        ("p.json", '{"observe": 3, "gradient_underflow": 0.5, "float32": ["h.0.*"]}'),
    ],
)
def test_thresholds_are_read_from_toml_and_json(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    read = PolicyConfig.read(tmp_path / name)
    assert read == PolicyConfig(observe=3, gradient_underflow=0.5, float32=("h.0.*",))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"underflow": 1}', "key 'underflow' is unknown; known: observe, value_underflow"),
        ('{"observe": 0}', "observe is 0"),
        ('{"observe": true}', "observe is True"),
        ('{"value_overflow": 2}', "value_overflow is 2"),
        ('{"value_overflow": "a"}', "value_overflow is 'a'"),
        ('{"float32": "wte"}', "float32 must be a list"),
        ("[]", "must be a table of keys"),
        ("{", "no valid JSON"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_bad_policy_file_is_refused_by_name(tmp_path: Path, text: str | None, named: str):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=f"p.json.*{named}"):
        PolicyConfig.read(path)


# ---- decisions ----------------------------------------------------------------------------------------


def parameter(name: str, value: float, gradient: float | None) -> Parameter:
    p = Linear(4, 4, bias=False).materialize(0).weight
    p.name, p.data = name, np.full((4, 4), value, "float32")
    p.grad = None if gradient is None else np.full((4, 4), gradient, "float32")
    return p


def decisions(
    *params: Parameter, scale: float = 2.0**16, used: Any = None, **changes: Any
) -> dict[str, Decision]:
    policy = PrecisionPolicy(PolicyConfig(observe=1, **changes))
    policy.observe([(p, p) for p in params])
    assert policy.complete and policy.observing
    stay = policy.decide(scale, [p.name for p in params] if used is None else used)
    assert stay == {d.name for d in policy.decisions.values() if d.dtype == "float32"}
    assert not policy.observing
    return policy.decisions


def test_each_reason_to_stay_in_float32():
    found = decisions(
        parameter("good.weight", 0.1, 1e-6),
        parameter("big.weight", 1e5, 1e-6),
        parameter("small.weight", 1e-9, 1e-6),
        parameter("steep.weight", 0.1, 10.0),
        parameter("flat.weight", 0.1, 1e-13),
        parameter("named.weight", 0.1, 1e-6),
        parameter("idle.weight", 0.1, None),
        parameter("broken.weight", 0.1, np.inf),
        float32=("named.*",),
    )
    dtypes = {name.split(".")[0]: d.dtype for name, d in found.items()}
    assert dtypes.pop("good") == dtypes.pop("idle") == "float16"
    assert set(dtypes.values()) == {"float32"}
    reasons = {name.split(".")[0]: d.reason for name, d in found.items()}
    assert reasons["good"] == "0.00% of gradients vanish at scale 65536, 0.00% unscaled"
    assert reasons["big"] == "100.00% of values overflow, allowed 0.00%"
    assert reasons["small"] == "100.00% of values vanish, allowed 50.00%"
    assert reasons["steep"] == "100.00% of gradients overflow at scale 65536, allowed 0.00%"
    assert reasons["flat"] == "100.00% of gradients vanish at scale 65536, allowed 5.00%"
    assert reasons["named"] == "the policy file says so: named.*"
    assert "overflow" in reasons["broken"]


def test_scaling_decides_whether_a_gradient_of_1e_8_fits():
    p = parameter("w", 0.1, 1e-8)
    assert decisions(p, scale=1.0)["w"].dtype == "float32"
    assert decisions(p, scale=2.0**16)["w"].dtype == "float16"


def test_a_layer_has_one_precision_and_unused_parameters_have_no_say():
    found = decisions(parameter("a.weight", 0.1, 1e-6), parameter("a.bias", 0.1, 1e-13),
                      parameter("n.weight", 0.1, 1e-6), used=["a.weight", "a.bias"])  # fmt: skip
    assert found["a.weight"] == Decision("a.weight", "float32", "shares its layer's operation with a.bias")
    assert found["n.weight"].reason == "no low-precision operation uses it"


# ---- in a training job --------------------------------------------------------------------------------


def small() -> Data:
    whole = load("docs", seq_len=16)
    return Data(Fewer(whole.train, 23), Fewer(whole.valid, 9), whole.info, whole.vocabulary)


def run(data: Data, file: Path, **layout: Any) -> tuple[dict[str, Decision], list[float], frozenset[str]]:
    settings = {
        "model": "gpt",
        "amp": "fp16",
        "dtype": None,
        "steps": 4,
        "precision_policy": str(file),
        **layout,
    }
    job = Job(TrainConfig(**settings).resolved(VERIFY_DEFAULTS), world(), data)
    losses = [r.loss for r in job.train()]
    job.evaluate()
    policy, casting = job.precision.policy, job.precision._autocast
    assert policy is not None and casting is not None
    return policy.decisions, losses, casting.float32_parameters


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(3, {}), (2, {"zero": 3}), (4, {"tp": 2, "dp": 2}), (2, {"pp": 2}), (3, {"partition": "bytes"})],
)
def test_every_rank_decides_the_same_and_as_the_serial_run(
    tmp_path: Path, ranks: int, layout: dict[str, Any]
):
    file, data = tmp_path / "policy.toml", small()
    # A threshold that some parameters keep and some break; two steps are observed, two run as decided.
    file.write_text('observe = 2\ngradient_underflow = 0.0005\nfloat32 = ["h.1.attn.c_proj.*"]\n')
    serial, losses, _ = launch(lambda: run(data, file), 1, timeout=30)[0]
    found = launch(lambda: run(data, file, **layout), ranks, timeout=30)
    for decided, ours, stay in found:
        assert {n: d.dtype for n, d in decided.items()} == {n: d.dtype for n, d in serial.items()}
        assert decided == found[0][0]
        assert stay == {d.name for d in decided.values() if d.dtype == "float32"}
        np.testing.assert_allclose(ours, losses, rtol=2e-3)
    used = {n: d for n, d in serial.items() if "no low-precision" not in d.reason}
    assert {d.dtype for d in used.values()} == {"float16", "float32"}
    assert serial["h.1.attn.c_proj.bias"].reason.startswith("the policy file says so")
    assert serial["h.0.ln_1.weight"].dtype == serial["wpe.weight"].dtype == "float32"


def decided(scale: float) -> PrecisionPolicy:
    policy = PrecisionPolicy(PolicyConfig(observe=1))
    params = [parameter("a.weight", 0.1, 1e-6), parameter("b.weight", 1e6, 1e-3)]
    policy.observe([(p, p) for p in params])
    policy.decide(scale, [p.name for p in params])
    return policy


def test_the_table():
    lines = decided(1024.0).table().splitlines()
    assert lines[0].split() == ["parameter", "computes", "in", "because"]
    assert [line.split()[:2] for line in lines[1:]] == [["a.weight", "float16"], ["b.weight", "float32"]]


@pytest.mark.parametrize(("scale", "name", "shift"), ((1024.0, "2^10", 10.0), (1000.0, "1000", 9.965784)))
def test_the_picture(scale: float, name: str, shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three panels over float16's range; bars stand where the numbers are, moved by the loss scale."""
    made: list[Any] = []

    def new_figure(*size: float) -> Any:
        made.append(plot.figure.new_figure(*size))
        return made[0]

    monkeypatch.setattr(plot.precision, "new_figure", new_figure)
    precision_histograms(decided(scale), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    panels = made[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["values", "gradients", f"gradients × loss scale {name}"]
    for axes in panels:
        assert [text.get_text() for text in axes.texts] == ["vanishes", "subnormal", "normal", "overflows"]
        assert [text.get_position()[0] for text in axes.texts] == [(-70 - 25) / 2, (-25 - 14) / 2, 1, (16 + 40) / 2]
    labels = [text.get_text() for text in made[0].legends[0].get_texts()]
    assert labels == ["computes in float16", "computes in float32"]
    bars = [[b.get_x() + b.get_width() / 2 for b in axes.patches if b.get_height() == 16] for axes in panels]
    values, gradients, scaled = (sorted(found) for found in bars)  # (float16's parameter, float32's)
    assert values == pytest.approx([-4 + 0.5, 19 + 0.5]) and gradients == pytest.approx([-20 + 0.5, -10 + 0.5])
    assert scaled == pytest.approx([place + shift for place in gradients], abs=1e-5)
