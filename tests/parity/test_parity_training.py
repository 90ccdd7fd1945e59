"""Layers' laws, optimizers and whole models against PyTorch built from the same weights.

Ten steps of training are compared weight by weight, by the measure of the design's invariants: for each
tensor, max|a - b| ≤ tol · max(max|b|, 1e-3 × the model's largest gradient).
"""

import numpy as np
import pytest

from minipar import nn
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig
from minipar.optim import SGD, Adam, AdamW, clip_grad_norm_
from minipar.tensor import Tensor

torch = pytest.importorskip("torch", reason="parity tests need PyTorch: pip install 'minipar[parity]'")
pytestmark = pytest.mark.parity
F = torch.nn.functional
RNG = np.random.default_rng(0)


# ---- PyTorch's side -----------------------------------------------------------------------------------


def torch_mlp(p, x):
    h = x.flatten(1)
    for i in range(2):
        h = F.relu(F.linear(h, p[f"layers.{i}.fc.weight"], p[f"layers.{i}.fc.bias"]))
    return F.linear(h, p["layers.2.fc.weight"], p["layers.2.fc.bias"])


def torch_convnet(norm):
    def normed(p, name, x):
        w, b = p[f"{name}.weight"], p[f"{name}.bias"]
        if norm == "group":
            return F.group_norm(x, 2, w, b)
        return F.batch_norm(x, None, None, w, b, training=True)

    def forward(p, x):
        h = F.relu(normed(p, "stem.norm", F.conv2d(x, p["stem.conv.weight"], padding=1)))
        for i, stride in enumerate((1, 2, 1)):
            at = f"layers.{i}"
            y = F.relu(
                normed(p, f"{at}.norm1", F.conv2d(h, p[f"{at}.conv1.weight"], stride=stride, padding=1))
            )
            y = normed(p, f"{at}.norm2", F.conv2d(y, p[f"{at}.conv2.weight"], padding=1))
            skip = F.conv2d(h, p[f"{at}.project.weight"], stride=stride) if stride == 2 else h
            h = F.relu(y + skip)
        return F.linear(h.mean((2, 3)), p["head.fc.weight"], p["head.fc.bias"])

    return forward


def torch_gpt(p, ids):
    def block(x, at):
        h = F.layer_norm(x, x.shape[-1:], p[f"{at}.ln_1.weight"], p[f"{at}.ln_1.bias"])
        qkv = F.linear(h, p[f"{at}.attn.c_attn.weight"], p[f"{at}.attn.c_attn.bias"])
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(y, p[f"{at}.attn.c_proj.weight"], p[f"{at}.attn.c_proj.bias"])
        h = F.layer_norm(x, x.shape[-1:], p[f"{at}.ln_2.weight"], p[f"{at}.ln_2.bias"])
        h = F.gelu(F.linear(h, p[f"{at}.mlp.c_fc.weight"], p[f"{at}.mlp.c_fc.bias"]), approximate="tanh")
        return x + F.linear(h, p[f"{at}.mlp.c_proj.weight"], p[f"{at}.mlp.c_proj.bias"])

    x = p["wte.weight"][ids] + p["wpe.weight"][: ids.shape[1]]
    for i in range(2):
        x = block(x, f"h.{i}")
    x = F.layer_norm(x, x.shape[-1:], p["ln_f.weight"], p["ln_f.bias"])
    return F.linear(x, p.get("lm_head.weight", p["wte.weight"]))


IMAGES, CLASSES = RNG.standard_normal((6, 3, 9, 9)), RNG.integers(0, 5, 6)
IDS = RNG.integers(0, 13, (4, 7))


def gpt(tied):
    return GPT(GPTConfig(vocab=13, seq_len=8, width=12, layers=2, heads=2, tied=tied))


def convnet(norm):
    return ConvNet(ConvNetConfig(channels=3, size=9, classes=5, width=4, layers=3, norm=norm, groups=2))


MODELS = [
    pytest.param(
        lambda: MLP(MLPConfig(inputs=243, classes=5, width=7)), torch_mlp, IMAGES, CLASSES, id="mlp"
    ),
    pytest.param(lambda: convnet("group"), torch_convnet("group"), IMAGES, CLASSES, id="convnet-group"),
    pytest.param(lambda: convnet("batch"), torch_convnet("batch"), IMAGES, CLASSES, id="convnet-batch"),
    pytest.param(lambda: gpt(True), torch_gpt, IDS, np.roll(IDS, -1, 1), id="gpt-tied"),
    pytest.param(lambda: gpt(False), torch_gpt, IDS, np.roll(IDS, -1, 1), id="gpt-untied"),
]
OPTIMIZERS = [
    pytest.param(lambda ps: SGD(ps, lr=0.1), lambda ps: torch.optim.SGD(ps, lr=0.1), id="sgd"),
    pytest.param(lambda ps: AdamW(ps, lr=1e-2), lambda ps: torch.optim.AdamW(ps, lr=1e-2), id="adamw"),
]


def assert_same(ours, theirs, gradients, tol):
    floor = 1e-3 * max(float(g.abs().max()) for g in gradients)
    for name, a in ours.items():
        b = theirs[name].detach().numpy()
        error, scale = np.abs(a - b).max(), max(np.abs(b).max(), floor)
        assert error <= tol * scale, f"{name}: {error / scale:.1e} over {tol}"


@pytest.mark.parametrize("ours, theirs", OPTIMIZERS)
@pytest.mark.parametrize("make, forward, x, targets", MODELS)
def test_ten_steps_equal_pytorch_s(make, forward, x, targets, ours, theirs):
    model = make().materialize(0, "float64")
    twin = {
        n: torch.tensor(v, requires_grad=True) for n, v in model.state_dict().items() if "running" not in n
    }
    optimizer, other = ours(model.parameters()), theirs(list(twin.values()))
    exact_gradients = isinstance(optimizer, SGD)
    for _ in range(10):
        model.zero_grad()
        loss = model.loss(model(Tensor(x) if x.dtype.kind == "f" else x), targets) * (1 / targets.size)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        other.zero_grad()
        logits = forward(twin, torch.tensor(x))
        reference = F.cross_entropy(logits.flatten(0, -2), torch.tensor(targets).flatten())
        reference.backward()
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(twin.values(), 1.0)), rel=1e-9)
        assert loss.item() == pytest.approx(float(reference.detach()), rel=1e-10)
        gradients = {n: p.grad for n, p in twin.items()}
        if exact_gradients:
            assert_same(
                {n: p.grad for n, p in model.named_parameters()}, gradients, gradients.values(), 1e-10
            )
        optimizer.step(), other.step()
        parameters = {n: p.data for n, p in model.named_parameters()}
        if not exact_gradients:
            # Adam divides by √v, so where a gradient is zero but for rounding (an attention key's bias),
            # its steps are rounding too: set those weights alike and compare all others.
            for n, p in parameters.items():
                noise = np.abs(gradients[n].numpy()) < 1e-9
                with torch.no_grad():
                    twin[n][torch.tensor(noise)] = torch.tensor(p[noise])
        assert_same(parameters, twin, gradients.values(), 1e-10)


@pytest.mark.parametrize("dtype, tol", [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize(
    "ours, theirs, options",
    [
        (SGD, "SGD", dict(lr=0.1)),
        (SGD, "SGD", dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01)),
        (SGD, "SGD", dict(lr=0.1, momentum=0.9, nesterov=True)),
        (Adam, "Adam", dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)),
        (AdamW, "AdamW", dict(lr=0.01, eps=1e-6, weight_decay=0.1)),
        (AdamW, "AdamW", {}),
    ],
)
def test_optimizers_over_twenty_steps_with_groups(ours, theirs, options, dtype, tol):
    mine = [Tensor(RNG.standard_normal(s).astype(dtype), requires_grad=True) for s in ((3, 4), (5,), (1,))]
    others = [torch.tensor(t.data, requires_grad=True) for t in mine]
    groups = lambda ts: [{"params": ts[:2]}, {"params": ts[2:], "lr": 0.03, "weight_decay": 0.0}]
    a, b = ours(groups(mine), **options), getattr(torch.optim, theirs)(groups(others), **options)
    for step in range(20):
        for t, o in zip(mine, others):
            t.grad = RNG.standard_normal(t.shape).astype(dtype)
            o.grad = torch.tensor(t.grad)
        if step == 7:
            mine[1].grad = others[1].grad = None
        a.step(), b.step()
        for t, o in zip(mine, others):
            np.testing.assert_allclose(t.data, o.detach().numpy(), rtol=tol, atol=tol)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (nn.Linear(7, 400), torch.nn.Linear(7, 400)),
        (nn.Conv2d(4, 200, (3, 2)), torch.nn.Conv2d(4, 200, (3, 2))),
        (nn.Conv2d(6, 300, 3, groups=3), torch.nn.Conv2d(6, 300, 3, groups=3)),
        (nn.Embedding(40, 50), torch.nn.Embedding(40, 50)),
        (nn.LayerNorm(5), torch.nn.LayerNorm(5)),
        (nn.GroupNorm(2, 6), torch.nn.GroupNorm(2, 6)),
        (nn.BatchNorm2d(5), torch.nn.BatchNorm2d(5)),
    ],
)
def test_layers_have_pytorch_s_names_shapes_and_initial_laws(ours, theirs):
    from scipy import stats

    ours.materialize(0)
    state = {n: v.numpy() for n, v in theirs.state_dict().items() if n != "num_batches_tracked"}
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in state.items()}
    for name, value in ours.state_dict().items():
        if value.size > 100:
            assert stats.ks_2samp(value.reshape(-1), state[name].reshape(-1)).pvalue > 1e-4, name
        else:
            np.testing.assert_array_equal(value, state[name])


def test_batch_norm_s_running_statistics():
    mine, other = nn.BatchNorm2d(3).materialize(0, "float64"), torch.nn.BatchNorm2d(3).double()
    for _ in range(3):
        x = RNG.standard_normal((4, 3, 2, 5)) * 3 + 1
        np.testing.assert_allclose(mine(Tensor(x)).data, other(torch.tensor(x)).detach().numpy(), rtol=1e-10)
    x = RNG.standard_normal((1, 3, 2, 2))
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(getattr(mine, name).data, getattr(other, name).numpy(), rtol=1e-12)
    expected = other.eval()(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(mine.eval()(Tensor(x)).data, expected, rtol=1e-10)
