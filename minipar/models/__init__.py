"""The serial models: `mlp`, `convnet`, `gpt`, `patchnet`; GPT-2's weight layout and text generation."""

from minipar.models.convnet import ConvNet, ConvNetConfig
from minipar.models.generate import generate
from minipar.models.gpt import GPT, GPTConfig
from minipar.models.mlp import MLP, MLPConfig
from minipar.models.model import Model
from minipar.models.patchnet import PatchNet, PatchNetConfig

__all__ = [
    "GPT", "MLP", "ConvNet", "ConvNetConfig", "GPTConfig", "MLPConfig", "Model", "PatchNet", "PatchNetConfig",
    "generate",
]  # fmt: skip
