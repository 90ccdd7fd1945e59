"""Small serial trainings that the two ways of consuming a partition are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipar import optim, random
from minipar.models import GPT, MLP, ConvNet, ConvNetConfig, GPTConfig, MLPConfig, Model
from tests.parallel.training_runs import LR, SEED, Arrays, Step, batches, gradients, loss_sum

STEPS = 10
MODELS: dict[str, Callable[[], Model]] = {
    "mlp": lambda: MLP(MLPConfig(inputs=12, classes=5, width=7, layers=4, dropout=0.2)),
    "convnet": lambda: ConvNet(ConvNetConfig(channels=2, size=6, classes=5, width=4, layers=2, groups=2)),
    "gpt-tied": lambda: GPT(GPTConfig(vocab=11, seq_len=6, width=8, layers=2, heads=2, dropout=0.1)),
    "gpt-untied": lambda: GPT(GPTConfig(vocab=11, seq_len=6, width=8, layers=2, heads=2, tied=False)),
}
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda params: optim.SGD(params, lr=LR),
    "momentum": lambda params: optim.SGD(params, lr=LR, momentum=0.5, weight_decay=0.01),
    "adamw": lambda params: optim.AdamW(params, lr=0.01),
}


@dataclass
class NormedStep(Step):
    """A step with the gradient's norm before the update."""

    norm: float = 0.0


@functools.cache
def serial_steps(kind: str, optimizer: str = "sgd", clip: float = 0.0) -> list[NormedStep]:
    """The plain training loop."""
    model = MODELS[kind]().materialize(SEED, "float64")
    update, steps = OPTIMIZERS[optimizer](model.parameters()), []
    for number, (inputs, targets) in enumerate(batches(kind, "float64", STEPS)):
        model.zero_grad()
        with random.at(seed=SEED, step=number, first_sample=0):
            loss = loss_sum(model, inputs, targets) / targets.size
            loss.backward()
        found = gradients(model)
        norm = optim.clip_grad_norm_(model.parameters(), clip or np.inf)
        update.step()
        steps.append(NormedStep(loss.item(), found, model.state_dict(), norm))
    return steps


def scale_of(step: Step) -> float:
    """The model's largest gradient."""
    return max(float(np.abs(g).max()) for g in step.gradients.values())


def errors(ours: Arrays, theirs: Arrays, scale: float) -> float:
    """The largest max|a - b| / max(max|b|, 1e-3 scale) over the tensors that `ours` has."""
    return max(
        (
            float(np.abs(a - theirs[name]).max()) / max(float(np.abs(theirs[name]).max()), 1e-3 * scale)
            for name, a in ours.items()
        ),
        default=0.0,
    )
