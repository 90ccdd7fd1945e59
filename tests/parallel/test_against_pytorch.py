"""Data parallelism against PyTorch's serial training: every gradient and weight, at every step."""

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the parity tests need PyTorch")
F = torch.nn.functional

from tests.parallel.training_runs import (  # noqa: E402
    LR,
    MODELS,
    STEPS,
    Arrays,
    Step,
    assert_equal_steps,
    batches,
    on_threads,
)
from tests.parallel.training_runs import build as build_model  # noqa: E402

pytestmark = pytest.mark.parity
Weights = dict[str, Any]


def mlp(w: Weights, x: Any) -> Any:
    for i in range(2):
        x = F.relu(F.linear(x, w[f"layers.{i}.fc.weight"], w[f"layers.{i}.fc.bias"]))
    return F.linear(x, w["layers.2.fc.weight"], w["layers.2.fc.bias"])


def convnet(norm: str) -> Callable[[Weights, Any], Any]:
    def normalise(w: Weights, name: str, x: Any) -> Any:
        weight, bias = w[name + ".weight"], w[name + ".bias"]
        if norm == "group":
            return F.group_norm(x, 2, weight, bias)
        return F.batch_norm(x, None, None, weight, bias, training=True)

    def forward(w: Weights, x: Any) -> Any:
        x = F.relu(normalise(w, "stem.norm", F.conv2d(x, w["stem.conv.weight"], padding=1)))
        for i, stride in enumerate((1, 2)):
            name = f"layers.{i}"
            h = F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1)
            h = F.relu(normalise(w, f"{name}.norm1", h))
            h = normalise(w, f"{name}.norm2", F.conv2d(h, w[f"{name}.conv2.weight"], padding=1))
            x = F.relu(h + (x if stride == 1 else F.conv2d(x, w[f"{name}.project.weight"], stride=stride)))
        return F.linear(x.mean((2, 3)), w["head.fc.weight"], w["head.fc.bias"])

    return forward


def gpt(w: Weights, ids: Any) -> Any:
    width, heads, tokens = w["wte.weight"].shape[1], 2, ids.shape[1]

    def linear(name: str, x: Any) -> Any:
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(name: str, x: Any) -> Any:
        return F.layer_norm(x, (width,), w[name + ".weight"], w[name + ".bias"])

    x = w["wte.weight"][ids] + w["wpe.weight"][:tokens]
    for i in range(sum(name.endswith("attn.c_attn.weight") for name in w)):
        qkv = linear(f"h.{i}.attn.c_attn", norm(f"h.{i}.ln_1", x))
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.split(width, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(f"h.{i}.attn.c_proj", y)
        h = F.gelu(linear(f"h.{i}.mlp.c_fc", norm(f"h.{i}.ln_2", x)), approximate="tanh")
        x = x + linear(f"h.{i}.mlp.c_proj", h)
    return F.linear(norm("ln_f", x), w.get("lm_head.weight", w["wte.weight"]))


FORWARD = {
    "mlp": mlp, "convnet": convnet("group"), "convnet-batch-norm": convnet("batch"),
    "gpt-tied": gpt, "gpt-untied": gpt,
}  # fmt: skip


def pytorch(kind: str, start: Arrays) -> list[Step]:
    """PyTorch's own serial training from the same weights."""
    w = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    optimizer, steps = torch.optim.SGD(w.values(), lr=LR, momentum=0.5), []
    for inputs, targets in batches(kind):
        optimizer.zero_grad()
        logits = FORWARD[kind](w, torch.tensor(inputs))
        loss = F.cross_entropy(logits.flatten(0, -2), torch.tensor(targets).flatten())
        loss.backward()
        found = {name: t.grad.numpy().copy() for name, t in w.items()}
        optimizer.step()
        steps.append(Step(loss.item(), found, {name: t.detach().numpy().copy() for name, t in w.items()}))
    return steps


@pytest.mark.parametrize("kind", FORWARD)
def test_three_ranks_train_as_pytorch_does_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_dropout(monkeypatch, kind)
    start = {name: p.data.copy() for name, p in build_model(kind).named_parameters()}
    expected = pytorch(kind, start)
    assert len(expected) == STEPS
    for steps in on_threads(3, kind):
        for step in steps:  # PyTorch's running statistics are not asked for
            step.state = {name: value for name, value in step.state.items() if name in start}
        assert_equal_steps(steps, expected)


def without_dropout(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """PyTorch draws other masks, so both sides go without."""
    make = MODELS[kind]

    def made() -> Any:
        model = make()
        for _, module in model.named_modules():
            if hasattr(module, "p"):
                module.p = 0.0
        return model

    monkeypatch.setitem(MODELS, kind, made)
