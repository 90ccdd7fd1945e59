"""The default tensor-parallel plan of each model, as data: which module is cut in which way."""

from __future__ import annotations

from minipar.errors import UsageError
from minipar.models import GPT, MLP, ConvNet, Model, PatchNet
from minipar.nn import Conv2d, GlobalAvgPool2d, GroupNorm
from minipar.parallel.tensor_parallel.convolution import (
    CONVOLUTION_CUTS,
    ImageHeight,
    RegionConv,
    RegionGroupNorm,
    RegionPool,
    RegionScatter,
)
from minipar.parallel.tensor_parallel.parallelize import Plan, SequenceLength, Style
from minipar.parallel.tensor_parallel.styles import (
    Column,
    CutDropout,
    EnterAfter,
    PartialGradients,
    Row,
    SequenceScatter,
    VocabularyEmbedding,
    VocabularyHead,
    VocabularyLoss,
)

DEFAULT_CUT = "output"


def default_plan(model: Model, *, sequence_parallel: bool = False, convolution: str | None = None) -> Plan:
    """Return the plan for a model.

    Args:
        sequence_parallel: also cut the activations between a GPT's regions along the sequence.
        convolution: how convolutions are cut: "output" (what None is), "input" or, in a ConvNet, "region".

    Raises:
        UsageError: a model without a plan, or an option that the model's plan does not have.
    """
    if sequence_parallel and not isinstance(model, GPT):
        raise UsageError(f"sequence parallelism cuts a sequence; {type(model).__name__} has none")
    if isinstance(model, ConvNet | PatchNet):
        return convnet_plan(model, DEFAULT_CUT if convolution is None else convolution)
    if convolution is not None:
        raise UsageError(f"convolution cut {convolution!r}: {type(model).__name__} has no convolutions")
    if isinstance(model, GPT):
        return gpt_plan(model, SequenceLength() if sequence_parallel else None)
    if isinstance(model, MLP):
        return mlp_plan(model)
    raise UsageError(f"{type(model).__name__} has no default plan; pass one to parallelize")


def gpt_plan(model: GPT, sequence: SequenceLength | None) -> Plan:
    """Megatron-LM's plan: vocabulary, heads and hidden features cut; two all-reduces a block each way.

    With `sequence` each all-reduce becomes an all-gather and a reduce-scatter, and norms and dropout between
    them work on a part of the sequence.
    """
    c = model.config
    head = c.width // c.heads
    plan: dict[str, Style | tuple[Style, ...]] = {
        "wte": VocabularyEmbedding(),
        "h.*.attn.c_attn": Column(groups=3, unit=head, sequence=sequence),
        "h.*.attn.attn_drop": CutDropout(c.heads),
        "h.*.attn.c_proj": Row(unit=head, sequence=sequence),
        "h.*.mlp.c_fc": Column(sequence=sequence),
        "h.*.mlp.c_proj": Row(sequence=sequence),
        "ln_f": EnterAfter(),
        "loss": VocabularyLoss(c.vocab),
    }
    if model.lm_head is not None:
        plan["lm_head"] = VocabularyHead()
    if sequence is not None:
        plan |= {
            "drop": SequenceScatter(sequence),
            "h.*.ln_1": PartialGradients(),
            "h.*.attn.resid_drop": CutDropout(sequence),
            "h.*.ln_2": PartialGradients(),
            "h.*.mlp.drop": CutDropout(sequence),
            "ln_f": (PartialGradients(), EnterAfter(sequence)),
        }
    return plan


def mlp_plan(model: MLP) -> Plan:
    """Column and row alternately: a pair needs one all-reduce each way; an odd last layer is joined."""
    plan: dict[str, Style] = {}
    count = len(model.layers)
    for i in range(count):
        if i % 2:
            plan[f"layers.{i}.fc"] = Row()
        elif i == count - 1:
            plan[f"layers.{i}.fc"] = Column(gathered=True)
        else:
            plan[f"layers.{i}.fc"] = Column()
            plan[f"layers.{i}.drop"] = CutDropout(model.config.width)
    return plan


def convnet_plan(model: ConvNet | PatchNet, convolution: str) -> Plan:
    """Every convolution cut in the same way; by region, norms and pooling too."""
    if convolution not in CONVOLUTION_CUTS:
        known = ", ".join(CONVOLUTION_CUTS)
        raise UsageError(f"convolution cut {convolution!r} is unknown: use one of {known}")
    modules = dict(model.named_modules())
    if convolution != "region":
        return {name: CONVOLUTION_CUTS[convolution]() for name, m in modules.items() if isinstance(m, Conv2d)}
    if isinstance(model, PatchNet):
        raise UsageError("convolution cut region is for a ConvNet; a PatchNet's patches see no neighbours: use --tiles")
    if model.config.norm != "group":
        raise UsageError("convolution cut region: batch norm is not offered over regions; use --norm group")
    image = ImageHeight()
    plan: dict[str, Style | tuple[Style, ...]] = {"stem": RegionScatter(image)}
    for name, m in modules.items():
        if isinstance(m, Conv2d):
            plan[name] = RegionConv(image)
        elif isinstance(m, GroupNorm):
            plan[name] = RegionGroupNorm(image)
        elif isinstance(m, GlobalAvgPool2d):
            plan[name] = RegionPool(image)
    return plan
