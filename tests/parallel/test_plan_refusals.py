"""Plans that cannot be: refused before any communication, with the same message on every rank."""

from __future__ import annotations

from typing import Any

import pytest

from minipar import launch, world
from minipar.errors import UsageError
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig
from minipar.nn import Linear
from minipar.parallel.tensor_parallel.convolution import OutputChannels
from minipar.parallel.tensor_parallel.parallelize import check_plan, parallelize
from minipar.parallel.tensor_parallel.plans import default_plan
from minipar.parallel.tensor_parallel.styles import Column, Row, VocabularyEmbedding, VocabularyLoss


def refusal(make: Any, plan: Any) -> list[tuple[str, int]]:
    def run() -> tuple[str, int]:
        model = make()
        with pytest.raises(UsageError) as error:
            parallelize(model, world(), plan(model))
        return str(error.value), world().ledger.calls()

    return launch(run, 3)


def tiny_gpt() -> GPT:
    return GPT(GPTConfig(11, 4, 8, 2, 4))


def tiny_mlp() -> MLP:
    return MLP(MLPConfig(4, 3, 6, 2))


def tiny_convnet() -> ConvNet:
    return ConvNet(ConvNetConfig(1, 4, 3, 4, 1, norm="batch"))


@pytest.mark.parametrize(
    ("make", "plan", "message"),
    [
        (
            tiny_gpt,
            default_plan,
            "h.0.attn.c_attn.weight: 3 ranks do not divide 4 heads; 1, 2, 4 ranks would",
        ),
        (
            tiny_mlp,
            lambda m: {"layer.*.fc": Column()},
            "plan: 'layer.*.fc' matches no module; the model has layers, layers.0, layers.0.fc,",
        ),
        (
            tiny_mlp,
            lambda m: {"layers.*.fc": Column(), "layers.1.*": Row()},
            "plan: both 'layers.*.fc' and 'layers.1.*' match layers.1.fc; a module is cut once",
        ),
        (
            tiny_mlp,
            lambda m: {"layers.0.fc": (Column(), Row())},
            "layers.0.fc.weight is placed twice, as Shard(0) and as Shard(1); place it once",
        ),
        (
            tiny_gpt,
            lambda m: {"wte": Column()},
            "plan: 'wte' puts Column on wte, a Embedding; it is for Linear",
        ),
        (
            tiny_mlp,
            lambda m: {"layers.0.fc": VocabularyEmbedding()},
            "plan: 'layers.0.fc' puts VocabularyEmbedding on layers.0.fc, a Linear; it is for Embedding",
        ),
        (
            tiny_mlp,
            lambda m: {"layers.0.fc": OutputChannels()},
            "plan: 'layers.0.fc' puts OutputChannels on layers.0.fc, a Linear; it is for Conv2d",
        ),
        (
            tiny_mlp,
            lambda m: default_plan(m, sequence_parallel=True),
            "sequence parallelism cuts a sequence; MLP has none",
        ),
        (
            tiny_convnet,
            lambda m: default_plan(m, convolution="channels"),
            "convolution cut 'channels' is unknown: use one of output, input, region",
        ),
        (
            tiny_convnet,
            lambda m: default_plan(m, convolution="region"),
            "convolution cut region: batch norm is not offered over regions; use --norm group",
        ),
        (
            tiny_gpt,
            lambda m: default_plan(m, convolution="nonsense"),
            "convolution cut 'nonsense': GPT has no convolutions",
        ),
        (lambda: Linear(2, 2), default_plan, "Linear has no default plan; pass one to parallelize"),
    ],
)
def test_refusals(make: Any, plan: Any, message: str) -> None:
    found = refusal(make, plan)
    assert found[0][0].startswith(message)
    assert found == [(found[0][0], 0)] * 3


def test_a_refused_plan_leaves_the_model_as_it_was() -> None:
    """The embedding and the first projection could be cut, a later module cannot."""

    def run(plan: Any) -> bool:
        model = tiny_gpt().materialize(0)
        forwards = [module.forward for _, module in model.named_modules()]
        with pytest.raises(UsageError):
            parallelize(model, world(), plan)
        assert all(p.layout is None and p.shape == p.global_shape for p in model.parameters())
        return forwards == [module.forward for _, module in model.named_modules()]

    heads = {"wte": VocabularyEmbedding(), "h.0.mlp.c_fc": Column(), "h.1.attn.c_attn": Column(groups=3, unit=2)}
    twice = {"wte": VocabularyEmbedding(), "h.0.mlp.c_fc": (Column(), Row())}
    loss = {"wte": VocabularyEmbedding(), "loss": VocabularyLoss(11)}
    model = tiny_gpt()
    for plan in (heads, twice):
        assert launch(run, 3, plan) == [True] * 3
    model.loss.reduction = "mean"
    with pytest.raises(UsageError, match="reduction 'mean'"):
        check_plan(model, 3, loss)
    assert all(p.layout is None for p in model.parameters())


def test_what_a_plan_does_not_cut_is_whole_on_every_rank() -> None:
    def run() -> list[str]:
        model = tiny_mlp()
        parallelize(model, world(), {"layers.0.fc": Column(gathered=True)})
        return [str(p.layout.placement) for p in model.parameters()]

    assert launch(run, 2) == [["Shard(0)", "Shard(0)", "Replicate()", "Replicate()"]] * 2


def test_a_model_is_cut_once() -> None:
    def run() -> str:
        model = tiny_mlp()
        plan = {"layers.0.fc": Column(), "layers.1.fc": Row()}
        parallelize(model, world(), plan)
        with pytest.raises(UsageError) as error:
            parallelize(model, world(), plan)
        return str(error.value)

    message = "layers.0.fc.weight is placed twice, as Shard(0) and as Shard(0); place it once"
    assert launch(run, 2) == [message] * 2


def test_a_mean_over_a_cut_vocabulary_is_refused() -> None:
    def make() -> GPT:
        model = tiny_gpt()
        model.loss.reduction = "mean"
        return model

    found = refusal(make, lambda m: {"loss": VocabularyLoss(11)})
    assert found == [("loss: reduction 'mean' is not offered over a cut vocabulary; use sum", 0)] * 3
