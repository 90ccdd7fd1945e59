"""Optimizers, gradient clipping and the learning-rate schedule, with PyTorch's formulas and defaults.

An optimizer sees tensors with `.data` and `.grad` and nothing else, so it works alike on whole parameters
and on the flat shards that sharded data parallelism gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from minipar import kernels
from minipar.backend import Array, array_module, is_gpu_array, to_device, to_host
from minipar.errors import UsageError
from minipar.kernels.gpu_graph import capturing
from minipar.tensor import Tensor

NORM_BLOCK = 1 << 17  # elements widened to float64 at a time, which stay in cache

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class Optimizer:
    """The part all optimizers share: parameter groups, state arrays by parameter, save and load.

    Args:
        params: tensors, or groups {"params": [...], "lr": …, "weight_decay": …} whose own values replace the
            defaults.
        defaults: the hyperparameters.

    Attributes:
        capturable: whether a step may be a part of a CUDA graph: what changes from step to step is on the GPU.
    """

    capturable = False

    def __init__(self, params: Params, defaults: dict[str, Any]):
        entries: list[Any] = list(params)
        groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
        self.param_groups: list[dict[str, Any]] = []
        for group in groups:
            unknown = sorted(set(group) - set(defaults) - {"params"})
            if unknown:
                raise UsageError(
                    f"{type(self).__name__}: unknown option {unknown[0]!r}; known: {sorted(defaults)}"
                )
            self.param_groups.append({**defaults, **group, "params": list(group["params"])})
            self.check(self.param_groups[-1])
        tensors = self.tensors()
        if not tensors:
            raise UsageError(f"{type(self).__name__}: no parameters to optimise")
        if len({id(t) for t in tensors}) != len(tensors):
            raise UsageError(f"{type(self).__name__}: a parameter is listed twice")
        self.state: dict[int, dict[str, Any]] = {i: {} for i in range(len(tensors))}

    def check(self, options: dict[str, Any]) -> None:
        """Refuse hyperparameters out of range; called for each group."""
        for name in ("lr", "momentum", "eps", "weight_decay"):
            if options.get(name, 0.0) < 0:
                raise UsageError(f"{type(self).__name__}: {name} = {options[name]} must not be negative")

    def tensors(self) -> list[Tensor]:
        """Return all parameters in group order; their positions are the keys of `state`."""
        return [t for group in self.param_groups for t in group["params"]]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self.param_groups:
            group["lr"] = lr

    def step(self) -> None:
        """Update every parameter that has a gradient.

        Raises:
            UsageError: a CUDA graph is being captured, in which this optimizer's numbers would stay what they are.
        """
        graph = capturing.get()
        if graph is not None and not self.capturable:
            raise UsageError(
                f"{type(self).__name__}: in a captured graph the learning rate and the step count would stay what"
                " they are: use AdamW(..., capturable=True), or take the step outside"
            )
        index, updated = 0, []
        for group in self.param_groups:
            for t in group["params"]:
                g = t.grad
                if g is not None:
                    self.update(t, g, self.state[index], group)
                    t.version += 1
                    updated.append(t)
                index += 1
        if graph is not None:
            graph.at_replay.append(lambda: _count_change(updated))

    def update(self, t: Tensor, g: Array, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change one parameter in place."""
        raise TypeError(f"{type(self).__name__} defines no update")

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for t in self.tensors():
            t.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return state arrays (host copies) and counters by parameter position, and each group's options."""
        state = {i: {k: _saved(k, v) for k, v in entry.items()} for i, entry in self.state.items()}
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"state": state, "groups": options}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            UsageError: another number of parameters or groups, other options (so another optimizer), or a
                state array of another shape. Nothing is changed then.
        """
        tensors = self.tensors()
        if len(saved["state"]) != len(tensors) or len(saved["groups"]) != len(self.param_groups):
            raise UsageError(
                f"optimizer state is for {len(saved['state'])} parameters in {len(saved['groups'])} groups,"
                f" this optimizer has {len(tensors)} in {len(self.param_groups)}"
            )
        for group, options in zip(self.param_groups, saved["groups"]):
            if set(options) != set(group) - {"params"}:
                raise UsageError(
                    f"optimizer state has options {sorted(options)}, {type(self).__name__} has"
                    f" {sorted(set(group) - {'params'})}"
                )
        fresh: dict[int, dict[str, Any]] = {}
        for (i, entry), t in zip(sorted(saved["state"].items()), tensors):
            device = "cuda" if is_gpu_array(t.data) else "cpu"
            for k, v in entry.items():
                if hasattr(v, "dtype") and v.shape != t.shape:
                    raise UsageError(
                        f"optimizer state {k!r} of parameter {i} is {v.shape}, the parameter is {t.shape}"
                    )
            fresh[i] = {
                k: to_device(v, device).copy() if hasattr(v, "dtype") else v for k, v in entry.items()
            }
        self.state = fresh
        for group, options in zip(self.param_groups, saved["groups"]):
            group.update(options)


def _saved(key: str, value: Any) -> Any:
    """Return an entry of the state as it is saved: a host copy; a count, wherever it is kept, as a number."""
    if key == "step":
        return int(value)
    return to_host(value).copy() if hasattr(value, "dtype") else value


def _count_change(tensors: list[Tensor]) -> None:
    """Count that the values have changed, where a replayed graph has changed them."""
    for t in tensors:
        t.version += 1


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, dampening, Nesterov momentum and weight decay."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )  # fmt: skip
        super().__init__(params, defaults)

    def check(self, options: dict[str, Any]) -> None:
        super().check(options)
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise UsageError("SGD: Nesterov momentum needs momentum > 0 and dampening 0")

    def update(self, t: Tensor, g: Array, state: dict[str, Any], group: dict[str, Any]) -> None:
        first = group["momentum"] != 0 and "momentum_buffer" not in state
        if first:
            state["momentum_buffer"] = array_module(t.data).zeros_like(t.data)
        kernels.of(t.data).sgd_step_(
            t.data, g, state.get("momentum_buffer"), group["lr"], group["momentum"], group["dampening"],
            group["nesterov"], group["weight_decay"], first,
        )  # fmt: skip


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); `weight_decay` is added to the gradient (L2).

    Args:
        capturable: keep the step count, and by it the bias corrections, and the learning rate on the GPU, so that
            the step can be captured (`CapturedStep`). Between replays change the rate by `set_lr`. That takes a few
            small kernels a tensor: lay parameters flat (`FlatTensor`).
    """

    decoupled = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.capturable = capturable
        self._rates: dict[int, Array] = {}  # learning rates on the device, by the group's identity

    def check(self, options: dict[str, Any]) -> None:
        super().check(options)
        if not all(0 <= b < 1 for b in options["betas"]):
            raise UsageError(f"{type(self).__name__}: betas {options['betas']} must lie in [0, 1)")

    def update(self, t: Tensor, g: Array, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            xp = array_module(t.data)
            state.update(step=0, exp_avg=xp.zeros_like(t.data), exp_avg_sq=xp.zeros_like(t.data))
        lr = self._on_device(t, state, group) if self.capturable else group["lr"]
        state["step"] += 1
        step = state["step"]
        if self.capturable and not is_gpu_array(t.data):  # the CPU's kernel computes with Python's numbers
            lr, step = float(lr), int(step)
        beta1, beta2 = group["betas"]
        kernels.of(t.data).adam_step_(
            t.data, g, state["exp_avg"], state["exp_avg_sq"],
            lr, beta1, beta2, group["eps"], group["weight_decay"], step, self.decoupled,
        )  # fmt: skip

    def _on_device(self, t: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Array:
        """Return the group's learning rate as a scalar array beside `t`, and keep the step count as one."""
        xp = array_module(t.data)
        if not hasattr(state["step"], "dtype"):
            state["step"] = xp.full((), state["step"], "float64")
        if id(group) not in self._rates:
            self._rates[id(group)] = xp.full((), group["lr"], "float64")
        return self._rates[id(group)]

    def set_lr(self, lr: float) -> None:
        super().set_lr(lr)
        self._refresh_rates()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        self._refresh_rates()

    def _refresh_rates(self) -> None:
        """Write each group's learning rate where captured steps read it."""
        for group in self.param_groups:
            if id(group) in self._rates:
                self._rates[id(group)][...] = group["lr"]


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): the weight itself shrinks by lr·λ."""

    decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        capturable: bool = False,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, capturable)


def squared_norm(gradients: Iterable[Array | None]) -> float:
    """Return the sum of squares of all gradients, in float64, where no float32 overflows; None counts nothing."""
    sums = [_squares(g) for g in gradients if g is not None]
    if sums and is_gpu_array(sums[0]):  # wait for the GPU once, not once a gradient
        return float(array_module(sums[0]).stack(sums).sum())
    return sum(sums, 0.0)


def _squares(g: Array) -> Any:
    """Return the sum of squares of one gradient; on a GPU as a scalar array there."""
    flat = g.reshape(-1)
    if is_gpu_array(flat):
        wide = flat.astype("float64")
        return (wide * wide).sum()
    total = 0.0
    for start in range(0, flat.size, NORM_BLOCK):
        part = flat[start : start + NORM_BLOCK].astype("float64")
        total += float(part @ part)
    return total


def clip_grad_norm_(params: Iterable[Tensor], max_norm: float, norm: float | None = None) -> float:
    """Scale all gradients so that their global 2-norm is at most `max_norm`; return the norm before that.

    Args:
        norm: the global norm where this rank cannot compute it alone (parameters sharded over ranks).

    Raises:
        FloatingPointError: the norm is NaN or infinite: scaling would spread that to every weight.
    """
    tensors = [t for t in params if t.grad is not None]
    norm = math.sqrt(squared_norm(t.grad for t in tensors)) if norm is None else norm
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {norm}: the loss overflowed or the data hold NaN")
    scale = max_norm / (norm + 1e-6)  # PyTorch's guard against a zero norm
    if scale < 1:
        for t in tensors:
            t.grad *= t.grad.dtype.type(scale)  # type: ignore[union-attr]
    return norm


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Return the learning rate of `step` (from 0): up over `warmup` steps, then half a cosine to `floor`.

    Loshchilov and Hutter 2017, equation 5, one cycle. A pure function, so resuming needs no state.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
