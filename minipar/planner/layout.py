"""A layout: how many ranks each axis has, and what else is chosen. And what a number takes in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from minipar.parallel.pipeline.formulas import FORMULAS


@dataclass(frozen=True)
class Precision:
    """Bytes a parameter takes as weight, gradient and optimizer state, and bytes of an activation.

    Attributes:
        weights: the parameter as it is stored.
        gradients: its gradient.
        state: what the optimizer keeps, a float32 copy included where there is one.
        activations: an element of the precision that matrix products compute in.
        high: an element of what mixed precision leaves in float32: what norms and losses keep, and residual sums.
        sent: an element of such arrays, and of tensor parallelism's sums, on its way to another rank.
        scores: an element of attention's probabilities; --amp fp16 keeps them in float16 on a GPU, and in float32 on a
            CPU, whose products are of float32.
        copies: of each parameter once more, in the precision of the products.
        compute: the name of the matrix products' precision, a key of `Machine.matmul`.
    """

    name: str
    weights: int
    gradients: int
    state: int
    activations: int
    high: int
    sent: int
    scores: int
    copies: int
    compute: str


PRECISIONS = {
    # Adam's two moments in the parameters' precision: what `minipar train` holds.
    "float32": Precision("float32", 4, 4, 8, 4, 4, 4, 4, 0, "float32"),
    "float64": Precision("float64", 8, 8, 16, 8, 8, 8, 8, 0, "float64"),
    # minipar's --amp fp16: float32 master weights and gradients, float16 copies of the weights for the products.
    # Messages count as float16, as Megatron-LM sends them; minipar itself sends float32 (`on_the_wire`).
    "fp16": Precision("fp16", 4, 4, 8, 2, 4, 2, 2, 2, "float16"),
    # Rajbhandari et al. 2020, section 3.1: float16 weights and gradients, and K = 12 bytes of float32 copy,
    # momentum and variance. What Megatron-LM and DeepSpeed hold, with float16 for all that is sent.
    "mixed": Precision("mixed", 2, 2, 12, 2, 2, 2, 2, 0, "float16"),
}


def on_the_wire(precision: Precision) -> Precision:
    """Return the precision with the messages that minipar itself sends: sums and residuals in float32.

    A sum over ranks of float16 parts, each rounded, would not be the product of the whole, rounded once.
    """
    return replace(precision, sent=precision.high)


@dataclass(frozen=True)
class Layout:
    """One way to lay a training run over ranks; tensor parallelism is innermost, data parallelism outermost.

    Attributes:
        zero: ZeRO stage over the data-parallel ranks.
        schedule, chunks: of the pipeline; "" where pp is 1.
        microbatches: pieces of each rank's part of the batch (gradient accumulation where pp is 1).
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    zero: int = 0
    schedule: str = ""
    microbatches: int = 1
    chunks: int = 1
    recompute: bool = False
    sequence_parallel: bool = False

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.dp * self.pp * self.tp

    def live(self, stage: int) -> int:
        """Return how many microbatches (times chunks) a stage holds activations of at most."""
        if self.pp == 1:
            return 1
        return FORMULAS[self.schedule].live(stage, self.pp, self.microbatches, self.chunks)

    def options(self) -> list[str]:
        """Return the options of `minipar train` that make this layout."""
        words = ["--dp", str(self.dp), "--pp", str(self.pp), "--tp", str(self.tp)]
        if self.zero:
            words += ["--zero", str(self.zero)]
        if self.pp > 1:
            words += ["--schedule", self.schedule, "--microbatches", str(self.microbatches)]
            words += ["--chunks", str(self.chunks)] if self.chunks > 1 else []
        elif self.microbatches > 1:
            words += ["--accumulate", str(self.microbatches)]
        words += ["--recompute"] if self.recompute else []
        words += ["--sequence-parallel"] if self.sequence_parallel else []
        return words

    def __str__(self) -> str:
        parts = [f"{axis} {n}" for axis, n in (("dp", self.dp), ("pp", self.pp), ("tp", self.tp)) if n > 1]
        words = [" × ".join(parts) or "1 rank"]
        words += [f"ZeRO {self.zero}"] if self.zero else []
        if self.pp > 1:
            words += [f"{self.schedule}{f' ×{self.chunks}' if self.chunks > 1 else ''}, m {self.microbatches}"]
        elif self.microbatches > 1:
            words += [f"accumulate {self.microbatches}"]
        words += ["recompute"] if self.recompute else []
        words += ["sequence parallel"] if self.sequence_parallel else []
        return ", ".join(words)
