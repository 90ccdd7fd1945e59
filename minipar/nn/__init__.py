"""Modules: `init` (initialisers), `module` (the tree), `layers`. Imports within run in that order."""

from minipar.nn import init
from minipar.nn.layers import (
    GELU,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    CrossEntropyLoss,
    Dropout,
    Embedding,
    Flatten,
    GlobalAvgPool2d,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    ReLU,
    RMSNorm,
    SiLU,
    Tanh,
)
from minipar.nn.module import Buffer, Module, ModuleList, Parameter, Sequential
