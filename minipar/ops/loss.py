"""Losses. Each can return the *sum* over its elements: the engine divides once, by the global count."""

from __future__ import annotations

from typing import Any

from minipar import kernels
from minipar.backend import Array
from minipar.errors import UsageError
from minipar.ops import reduce
from minipar.tensor import Tensor, casting, primitive

REDUCTIONS = ("mean", "sum", "none")


def _check_reduction(name: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise UsageError(f"{name}: reduction {reduction!r} is unknown: use one of {', '.join(REDUCTIONS)}")


@primitive(fresh=True, precision="inside")
def _cross_entropy(logits, targets, ignore_index, label_smoothing):
    k = kernels.of(logits)
    losses, saved = k.cross_entropy(logits, targets, ignore_index, label_smoothing)

    def vjp(g: Array) -> Any:
        dlogits = k.cross_entropy_backward(g, logits, targets, saved, ignore_index, label_smoothing)
        return dlogits, None, None, None

    return losses, vjp


def cross_entropy(
    logits: Tensor,
    targets: Any,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Softmax and negative log-likelihood in one, in nats.

    Args:
        logits: (..., V). targets: integers (...) in [0, V), or `ignore_index`, which counts nothing.
        label_smoothing: ε of Szegedy et al. 2016: the target law is (1-ε)·one-hot + ε/V.
        reduction: "mean" over the targets that are not ignored, "sum", or "none" for one loss a target.

    Raises:
        ValueError: shapes that do not fit, a target out of range, an unknown reduction, or the mean over
            no valid target at all.
    """
    _check_reduction("cross_entropy", reduction)
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"cross_entropy: label_smoothing {label_smoothing} must lie in [0, 1]")
    labels = targets.data if isinstance(targets, Tensor) else targets
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"cross_entropy: logits {logits.shape} need targets {logits.shape[:-1]}, got {labels.shape}"
        )
    rows = logits if logits.ndim == 2 else logits.reshape((labels.size, logits.shape[-1]))  # (N, V)
    losses = _cross_entropy(rows, labels.reshape(-1), ignore_index, label_smoothing)  # (N,), float32 or wider
    # Without autocast the result has the input's dtype, as any operation's.
    if casting.get() is None and losses.dtype != logits.dtype:
        losses = losses.astype(logits.dtype)
    if reduction == "none":
        return losses.reshape(labels.shape)
    total = reduce.sum(losses)
    if reduction == "sum":
        return total
    valid = int((labels != ignore_index).sum())
    if valid == 0:
        raise ValueError(
            f"cross_entropy: none of {labels.size} targets is valid, so there is no mean; use reduction sum"
        )
    return total / valid


@primitive(fresh=True, precision="float32")
def _squared_error(a, b):
    error = a - b
    return error * error, lambda g: (lambda: 2 * g * error, lambda: -2 * g * error)


def mse_loss(prediction: Tensor, target: Any, reduction: str = "mean") -> Tensor:
    """Squared error, (prediction - target)², reduced over all elements.

    Raises:
        ValueError: shapes that differ (broadcasting (N, 1) against (N,) would be silent and wrong).
    """
    _check_reduction("mse_loss", reduction)
    if prediction.shape != target.shape:
        raise ValueError(
            f"mse_loss: prediction {prediction.shape} and target {target.shape} must have one shape"
        )
    error = _squared_error(prediction, target)
    if reduction == "none":
        return error
    return reduce.sum(error) if reduction == "sum" else reduce.mean(error)
