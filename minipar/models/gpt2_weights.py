"""GPT-2's public weight layout: the same names, but linear weights stored as (in, out).

The original code multiplied by x W, not x Wᵀ, so its four linear weights per block lie transposed. They are
turned here, on the way in and out, and nowhere else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from minipar.backend import Array
from minipar.errors import DataError, UsageError
from minipar.models.gpt import GPT, GPTConfig

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def turned(name: str, value: Array) -> Array:
    """Return a tensor as it lies in the other layout: a view, transposed if it is one of those four weights."""
    return value.T if name.endswith(TRANSPOSED) else value


def to_gpt2(state: dict[str, Array]) -> dict[str, Array]:
    """Return a GPT's state dict in GPT-2's layout."""
    return {name: np.ascontiguousarray(turned(name, value)) for name, value in state.items()}


def from_gpt2(tensors: dict[str, Array]) -> dict[str, Array]:
    """Return GPT-2 tensors as a state dict of `GPT`: prefix removed, mask buffers dropped, weights turned."""
    state = {}
    for full, value in tensors.items():
        name = full.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, stored as a buffer by some versions
        state[name] = turned(name, value)
    if "lm_head.weight" in state and np.array_equal(state["lm_head.weight"], state.get("wte.weight", 0)):
        del state["lm_head.weight"]  # tied, stored twice
    return state


def config_of(state: dict[str, Array], heads: int) -> GPTConfig:
    """Return the sizes read off a state dict; only the number of heads leaves no trace in the shapes."""
    vocab, width = state["wte.weight"].shape
    layers = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("h.")), default=-1)
    tied = "lm_head.weight" not in state
    return GPTConfig(vocab, state["wpe.weight"].shape[0], width, layers, heads, tied=tied)


def read_safetensors(path: Path) -> dict[str, Array]:
    """Return the tensors of a safetensors file.

    Raises:
        UsageError: the file does not exist.
        DataError: it is truncated or no safetensors file.
    """
    if not path.is_file():
        raise UsageError(f"weights {path} do not exist")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise DataError(f"weights {path} cannot be read: {error}") from None


def load(path: Path, heads: int) -> GPT:
    """Return a GPT with the weights of a safetensors file in GPT-2's layout."""
    state = from_gpt2(read_safetensors(path))
    if "wte.weight" not in state or "wpe.weight" not in state:
        raise DataError(f"weights {path} are not GPT-2's: wte.weight or wpe.weight is missing")
    model = GPT(config_of(state, heads))
    model.assign_paths()
    model.load_state_dict(state)
    return model
