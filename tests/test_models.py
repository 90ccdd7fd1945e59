"""The serial models: shapes, losses, dropout over split batches, GPT-2's layout, generation, refusals."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minipar import random
from minipar.errors import DataError, UsageError
from minipar.gradcheck import gradcheck
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig, generate
from minipar.models.gpt2_weights import load
from minipar.tape import no_grad
from minipar.tensor import Tensor
from minipar.weights import save_weights

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((4, 3, 9, 9))
IDS = RNG.integers(0, 13, (4, 6))
SMALL = GPTConfig(vocab=13, seq_len=6, width=8, layers=2, heads=2)


def mlp(dropout=0.0):
    return MLP(MLPConfig(inputs=3 * 81, classes=5, width=7, layers=3, dropout=dropout))


def convnet(norm="group"):
    return ConvNet(ConvNetConfig(channels=3, size=9, classes=5, width=4, layers=3, norm=norm, groups=2))


def gpt(tied=True, dropout=0.0):
    return GPT(GPTConfig(**{**vars(SMALL), "tied": tied, "dropout": dropout}))


MODELS = [
    pytest.param(mlp, IMAGES, RNG.integers(0, 5, 4), (4, 5), id="mlp"),
    pytest.param(convnet, IMAGES, RNG.integers(0, 5, 4), (4, 5), id="convnet-group"),
    pytest.param(lambda: convnet("batch"), IMAGES, RNG.integers(0, 5, 4), (4, 5), id="convnet-batch"),
    pytest.param(gpt, IDS, np.roll(IDS, -1, 1), (4, 6, 13), id="gpt-tied"),
    pytest.param(lambda: gpt(tied=False), IDS, np.roll(IDS, -1, 1), (4, 6, 13), id="gpt-untied"),
]


@pytest.mark.parametrize("make, x, targets, shape", MODELS)
def test_every_parameter_s_gradient_by_differences(make, x, targets, shape):
    model = make().materialize(0, "float64")
    parameters = list(model.parameters())
    values = [p.data for p in parameters]

    def loss(*tensors):
        for p, t in zip(parameters, tensors):
            p.assign_(t.data)
        value = model.loss(model(x if x.dtype.kind == "i" else Tensor(x)), targets)
        return value

    total = loss(*[Tensor(v.copy()) for v in values])
    assert total.shape == () and model(Tensor(x) if x.dtype.kind == "f" else x).shape == shape
    total.backward()
    names = [n for n, _ in model.named_parameters()]
    for name, p, v in zip(names, parameters, values):
        direction = np.random.default_rng(1).standard_normal(p.shape)
        base = v.copy()
        with no_grad():
            ends = []
            for sign in (1, -1):
                p.assign_(base + sign * 1e-6 * direction)
                ends.append(model.loss(model(Tensor(x) if x.dtype.kind == "f" else x), targets).item())
            p.assign_(base)
        numeric, analytic = (ends[0] - ends[1]) / 2e-6, float((p.grad * direction).sum())
        assert abs(numeric - analytic) <= 1e-6 * max(abs(numeric), 1), name


@pytest.mark.parametrize("make, x, targets, shape", MODELS)
def test_float32_stays_float32(make, x, targets, shape):
    model = make().materialize(0)
    out = model(Tensor(x.astype(np.float32)) if x.dtype.kind == "f" else x)
    loss = model.loss(out, targets) * (1 / targets.size)
    loss.backward()
    assert out.dtype == loss.dtype == np.float32
    assert {p.grad.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    # An untrained classifier knows nothing: about log(classes) nats per target.
    assert abs(loss.item() - np.log(shape[-1])) < 0.8


@pytest.mark.parametrize("make, x, targets, shape", MODELS)
def test_blocks_are_the_model_and_the_loss_is_a_sum(make, x, targets, shape):
    model = make().materialize(0, "float64")
    out = h = x if x.dtype.kind == "i" else Tensor(x)
    for block in model.blocks:
        h = block(h)
    np.testing.assert_array_equal(h.data, model(out).data)
    flat = h.data.reshape(-1, shape[-1])
    logp = flat - np.log(np.exp(flat).sum(1, keepdims=True))
    assert model.loss(h, targets).item() == pytest.approx(
        -logp[np.arange(len(flat)), targets.reshape(-1)].sum()
    )
    owned = {id(p) for p in model.parameters()}
    assert {id(p) for b in model.blocks for p in b.parameters()} == owned


@pytest.mark.parametrize(
    "make, x", [(lambda: mlp(0.4), IMAGES), (lambda: gpt(dropout=0.4), IDS)], ids=["mlp", "gpt"]
)
def test_dropout_of_a_split_batch_is_the_whole_batch_s(make, x):
    model = make().materialize(0, "float64")
    wrap = (lambda a: Tensor(a)) if x.dtype.kind == "f" else (lambda a: a)
    with random.at(seed=3, step=9):
        whole = model(wrap(x)).data
        halves = []
        for start, stop in ((0, 3), (3, 4)):
            with random.at(first_sample=start):
                halves.append(model(wrap(x[start:stop])).data)
    # Equal up to the last bits of sums: one flipped mask bit would show in the first digit.
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-10, atol=1e-12)
    with random.at(seed=3, step=10):
        assert not np.allclose(model(wrap(x)).data, whole)
    assert not np.allclose(model.eval()(wrap(x)).data, whole)


def test_attention_with_dropout_is_attention_when_nothing_drops():
    model = gpt(dropout=1e-12).materialize(0, "float64")
    plain = gpt().materialize(0, "float64")
    np.testing.assert_allclose(model(IDS).data, plain(IDS).data, rtol=1e-9, atol=1e-12)
    attention = model.h[0].attn
    gradcheck(lambda x: attention(x), [RNG.standard_normal((2, 5, 8))])


def test_tied_and_untied_parameters():
    tied, untied = gpt().materialize(0), gpt(tied=False).materialize(0)
    assert "lm_head.weight" not in tied.state_dict() and tied.blocks[-1].out is tied.wte
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"lm_head.weight"}
    std = {n: p.data.std() for n, p in GPT(GPTConfig(200, 64, 64, 8, 4)).materialize(0).named_parameters()}
    assert std["wte.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["h.3.attn.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert std["h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert std["h.3.attn.c_attn.bias"] == 0


# ---- GPT-2's layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_layout_round_trip(tmp_path, tied):
    model = gpt(tied).materialize(0)
    path = tmp_path / "model.safetensors"
    save_weights(model, path)
    stored = load_file(path)
    assert stored["h.0.attn.c_attn.weight"].shape == (8, 24) and stored["h.0.mlp.c_fc.weight"].shape == (
        8,
        32,
    )
    np.testing.assert_array_equal(stored["h.1.mlp.c_proj.weight"], model.h[1].mlp.c_proj.weight.data.T)
    again = load(path, heads=2)
    assert again.config == model.config
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)


def public_style(model):
    """The file as published: prefixed, transposed, with mask buffers and the tied head stored twice."""
    out = {}
    for name, value in model.state_dict().items():
        turned = value.ndim == 2 and ("attn" in name or "mlp" in name)
        out[f"transformer.{name}"] = np.ascontiguousarray(value.T if turned else value)
    for i in range(2):
        out[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 6, 6), np.float32))
        out[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    out["lm_head.weight"] = out["transformer.wte.weight"].copy()
    return out


def test_a_public_style_file_loads(tmp_path):
    model = gpt().materialize(7)
    path = tmp_path / "public.safetensors"
    save_file(public_style(model), path)
    again = load(path, heads=2)
    assert again.config == SMALL
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    other = public_style(model)
    other["lm_head.weight"] += 1
    save_file(other, path)
    assert not load(path, heads=2).config.tied


def test_bad_weight_files(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UsageError, match=r"w\.safetensors do not exist"):
        load(path, 2)
    save_weights(gpt().materialize(0), path)
    with pytest.raises(UsageError, match="3 heads do not divide width 8"):
        load(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"w\.safetensors cannot be read"):
        load(path, 2)
    save_file({"conv.weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(DataError, match="not GPT-2's"):
        load(path, 2)
    state = public_style(gpt().materialize(0))
    del state["transformer.h.0.ln_1.bias"]
    save_file(state, path)
    with pytest.raises(UsageError, match=r"missing \['h.0.ln_1.bias'\]"):
        load(path, 2)


# ---- generation ---------------------------------------------------------------------------------------


def test_generation():
    model = gpt(dropout=0.5).materialize(0)
    for p in model.parameters():
        p.assign_(p.data * 20)  # an opinionated model, so that its distribution is far from uniform
    prompt = np.array([1, 2, 3])
    a, b = (generate(model, prompt, 20, seed=4) for _ in range(2))
    assert a.dtype == np.int64 and a.shape == (23,) and a[:3].tolist() == [1, 2, 3]  # 20 > seq_len of 6
    assert a.tolist() == b.tolist() and a.max() < 13
    assert generate(model, prompt, 20, seed=5).tolist() != a.tolist()
    assert generate(model, prompt, 8, seed=4).tolist() == a[:11].tolist()
    greedy = generate(model, prompt, 6, temperature=0)
    assert greedy.tolist() == generate(model, prompt, 6, top_k=1, seed=9).tolist()
    assert max(generate(model, prompt, 40, temperature=9.0, vocab=3)[len(prompt) :]) < 3  # the rest is never met
    model.eval()
    for i in range(3, 9):
        assert greedy[i] == model(greedy[None, max(0, i - 6) : i]).data[0, -1].argmax()
    assert not model.training
    generate(model.train(), prompt, 1)
    assert model.training


def test_generation_follows_the_distribution():
    model = GPT(GPTConfig(vocab=4, seq_len=1, width=4, layers=1, heads=1)).materialize(0)
    for p in model.parameters():
        p.assign_(p.data * 40)
    prompt = np.array([2])
    logits = model.eval()(prompt[None]).data[0, -1].astype(np.float64)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 2)):
        scaled = logits / temperature
        if top_k:
            scaled[np.argsort(scaled)[:-top_k]] = -np.inf
        law = np.exp(scaled - scaled.max())
        law /= law.sum()
        options = dict(temperature=temperature, top_k=top_k)
        drawn = [generate(model, prompt, 1, seed=s, **options)[-1] for s in range(600)]
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 600, law, atol=0.07)


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda: GPTConfig(width=10, heads=4),
            r"GPT: 4 heads do not divide width 10; these would: \[1, 2, 5\]",
        ),
        (lambda: GPTConfig(layers=0), "GPT: every size must be at least 1"),
        (lambda: MLP(MLPConfig(layers=0)), "MLP: 0 layers"),
        (lambda: ConvNet(ConvNetConfig(norm="layer")), "norm 'layer' is unknown: use group or batch"),
        (lambda: ConvNet(ConvNetConfig(width=12, groups=8)), "GroupNorm: 8 groups do not divide 12 channels"),
        (lambda: gpt().materialize(0)(np.zeros((1, 7), int)), "GPT: 7 tokens, the model has positions for 6"),
        (lambda: generate(gpt().materialize(0), np.array([], int), 3), "generate: the prompt is empty"),
        (lambda: generate(gpt().materialize(0), np.array([1]), 3, temperature=-1), "temperature -1"),
        (lambda: generate(gpt().materialize(0), np.array([1]), 3, top_k=0), "top_k 0"),
        (lambda: generate(gpt().materialize(0), np.array([13]), 3), "embedding: .*13"),
        (lambda: mlp().materialize(0)(Tensor(np.ones((2, 5), np.float32))), r"linear: .*got \(2, 5\)"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
