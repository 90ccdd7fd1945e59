"""Sampling text from a GPT."""

from __future__ import annotations

import numpy as np

from minipar import random
from minipar.backend import Array, array_module, to_host
from minipar.errors import UsageError
from minipar.models.gpt import GPT
from minipar.tape import no_grad


def generate(
    model: GPT,
    prompt: Array,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    vocab: int | None = None,
) -> Array:
    """Return `prompt` (T,) followed by `tokens` sampled ids, int64 (T + tokens,).

    Args:
        temperature: divides the logits; 0 takes the likeliest token every time.
        top_k: sample among the k likeliest tokens only.
        vocab: sample among the first so many ids only, where the model has more than its data; default: all.
        seed: token i is drawn from the stream (seed, "generate", i), so equal seeds give equal text.

    Raises:
        UsageError: an empty prompt, a negative temperature or top_k < 1.
    """
    if len(prompt) == 0:
        raise UsageError("generate: the prompt is empty; give at least one token")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise UsageError(f"generate: temperature {temperature} must be ≥ 0 and top_k {top_k} ≥ 1")
    was_training = model.training
    model.eval()
    ids = np.asarray(prompt, dtype=np.int64)
    xp = array_module(model.wte.weight.data)
    try:
        with no_grad():
            for i in range(tokens):
                window = ids[-model.config.seq_len :]
                logits = to_host(model(xp.asarray(window[None]))[0, -1, :vocab].data).astype(np.float64)  # (V,)
                ids = np.append(ids, _pick(logits, temperature, top_k, seed, i))
    finally:
        model.train(was_training)
    return ids


def _pick(logits: Array, temperature: float, top_k: int | None, seed: int, i: int) -> int:
    """Return one id drawn from softmax(logits / temperature), restricted to the top k."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = np.where(logits >= np.partition(logits, -top_k)[-top_k], logits, -np.inf)
    weights = np.exp((logits - logits.max()) / temperature)
    cumulative = np.cumsum(weights)
    u = random.uniform(random.stream(seed, "generate", i), 0, 1)[0]
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
