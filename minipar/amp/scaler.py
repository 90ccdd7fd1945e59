"""The gradient scaler: keeps small float16 gradients from vanishing, and skips steps that overflowed.

float16 has nothing below 2**-24 ≈ 6e-8. Multiplying the loss by S multiplies every gradient by S on its way
down; before the step they are divided by S in float32. S is found by trial: it doubles after many good steps,
and an overflow halves it and costs one step. Micikevicius et al. 2018, "Mixed precision training", 3.2.

    found_inf   growth tracker         scale
    no          + 1                    the same
    no          reaches the interval   × growth_factor, tracker 0
    yes         0                      × backoff_factor
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from minipar import optim
from minipar.backend import Array, array_module, to_host
from minipar.errors import UsageError
from minipar.tensor import Tensor

if TYPE_CHECKING:  # comm stands above this floor: communicators come in as arguments
    from minipar.comm.interface import Communicator

LARGEST = float(np.finfo(np.float32).max)
READY, UNSCALED, STEPPED = "ready", "unscaled", "stepped"


class GradScaler:
    """Scales the loss, unscales gradients, skips steps and adapts the scale, as torch.amp.GradScaler does.

    Args:
        init_scale, growth_factor, backoff_factor, growth_interval: PyTorch's, with its defaults.
        enabled: False makes every method pass things through.
        comm: all ranks that train together (the whole mesh). An overflow on any of them counts on all, so
            that either every rank takes the step or none does. Unscaling is collective then.
        hysteresis: how many overflows it takes to lower the scale; from then on each one lowers it, until the
            scale has grown again (Megatron-LM's rule). 1 is PyTorch's behaviour.
        floor: the scale never falls below this.

    Raises:
        UsageError: a factor, interval, hysteresis or scale out of range.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        comm: Communicator | None = None,
        hysteresis: int = 1,
        floor: float = 0.0,
    ):
        if isinstance(init_scale, str):
            raise UsageError(
                f"GradScaler: {init_scale!r} is PyTorch's device, which is not asked for here: the first argument"
                " is init_scale, a number"
            )
        self.set_growth_factor(growth_factor)
        self.set_backoff_factor(backoff_factor)
        self.set_growth_interval(growth_interval)
        if hysteresis < 1:
            raise UsageError(f"GradScaler: hysteresis = {hysteresis} must be at least 1")
        if not (0 <= floor <= init_scale < float("inf") and init_scale > 0):
            raise UsageError(
                f"GradScaler: init_scale = {init_scale} must be positive and not below floor = {floor}"
            )
        self._scale, self._growth_tracker, self._hysteresis_left = float(init_scale), 0, hysteresis
        self.hysteresis, self.floor = hysteresis, floor
        self.enabled, self.comm = enabled, comm
        self._stages: dict[int, str] = {}
        self._found: dict[int, bool] = {}

    def is_enabled(self) -> bool:
        """Whether the scaler does anything."""
        return self.enabled

    def get_scale(self) -> float:
        """Return the present loss scale; 1 if the scaler is not enabled."""
        return self._scale if self.enabled else 1.0

    def get_growth_factor(self) -> float:
        """Return what the scale is multiplied by after `growth_interval` good steps."""
        return self.growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Set it; UsageError unless it is above 1."""
        if new_factor <= 1:
            raise UsageError(f"GradScaler: growth_factor = {new_factor} must be above 1")
        self.growth_factor = new_factor

    def get_backoff_factor(self) -> float:
        """Return what the scale is multiplied by after an overflow."""
        return self.backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set it; UsageError unless it lies between 0 and 1."""
        if not 0 < new_factor < 1:
            raise UsageError(f"GradScaler: backoff_factor = {new_factor} must lie between 0 and 1")
        self.backoff_factor = new_factor

    def get_growth_interval(self) -> int:
        """Return how many good steps in a row it takes for the scale to grow."""
        return self.growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        """Set it; UsageError unless it is at least 1."""
        if new_interval < 1:
            raise UsageError(f"GradScaler: growth_interval = {new_interval} must be at least 1")
        self.growth_interval = new_interval

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale: call backward on that."""
        return loss * self._scale if self.enabled else loss

    def unscale_(self, optimizer: optim.Optimizer) -> None:
        """Divide the gradients of an optimizer's tensors by the scale, in place, and look for overflow.

        Collective over `comm`. `step` calls it if you have not.

        Raises:
            RuntimeError: it was called already since the last `update`, or after `step`.
            UsageError: float16 gradients, in which unscaled values would vanish: parameters must be float32.
        """
        if not self.enabled:
            return
        stage = self._stages.get(id(optimizer), READY)
        if stage == UNSCALED:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update()."
            )
        if stage == STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        grads = [t.grad for t in optimizer.tensors() if t.grad is not None]
        for g in grads:
            if g.dtype.itemsize == 2:
                raise UsageError(
                    f"GradScaler: a gradient is {g.dtype}, in which small values would vanish again once they"
                    " are unscaled: keep parameters float32 (master weights) and run forward under autocast"
                )
        inverse = 1.0 / self._scale
        with np.errstate(over="ignore", invalid="ignore"):  # what overflowed is looked for, not warned of
            for g in grads:
                g *= g.dtype.type(inverse)
        self._found[id(optimizer)] = self._on_any_rank(not _all_finite(grads))
        self._stages[id(optimizer)] = UNSCALED

    def _on_any_rank(self, found: bool) -> bool:
        if self.comm is None or self.comm.size == 1:
            return found
        return bool(self.comm.all_reduce(np.array([found], np.uint8), op="max")[0])

    def found_inf(self, optimizer: optim.Optimizer) -> bool:
        """Whether the gradients last unscaled held an infinity or NaN, on any rank."""
        return self._found.get(id(optimizer), False)

    def step(self, optimizer: optim.Optimizer, take: Callable[[], Any] | None = None) -> Any:
        """Take the optimizer's step unless a gradient overflowed; unscale first if that is still to be done.

        A skipped step changes nothing: weights, moments and step counts stay.

        Args:
            take: what takes the step in place of `optimizer.step`, such as `lambda: zero.step(optimizer)`.

        Returns:
            What the step returned, None if it was skipped.

        Raises:
            RuntimeError: called twice since the last `update`.
        """
        take = optimizer.step if take is None else take
        if not self.enabled:
            return take()
        stage = self._stages.get(id(optimizer), READY)
        if stage == STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if stage == READY:
            self.unscale_(optimizer)
        self._stages[id(optimizer)] = STEPPED
        return None if self._found[id(optimizer)] else take()

    def update(self, new_scale: float | None = None) -> None:
        """Adapt the scale to what was found since the last call, or set it.

        Raises:
            RuntimeError: no gradient was looked at since the last call.
        """
        if not self.enabled:
            return
        if new_scale is not None:
            self._scale = float(new_scale)
        elif not self._found:
            raise RuntimeError("No inf checks were recorded prior to update.")
        elif any(self._found.values()):
            self._growth_tracker = 0
            self._hysteresis_left -= 1
            if self._hysteresis_left <= 0:
                self._scale = max(self._scale * self.backoff_factor, self.floor)
        else:
            self._growth_tracker += 1
            if self._growth_tracker >= self.growth_interval:
                self._growth_tracker, self._hysteresis_left = 0, self.hysteresis
                grown = self._scale * self.growth_factor
                self._scale = grown if grown <= LARGEST else self._scale
        self._stages, self._found = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the scale, the factors and the trackers; empty if the scaler is not enabled."""
        if not self.enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._growth_tracker,
            "hysteresis": self.hysteresis,
            "_hysteresis_left": self._hysteresis_left,
            "floor": self.floor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned here, or in PyTorch, which has no hysteresis and no floor.

        Raises:
            UsageError: an empty state, or an entry that is missing or unknown.
        """
        if not self.enabled:
            return
        own = self.state_dict()
        needed = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
        missing, unknown = sorted(needed - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise UsageError(f"scaler state: missing {missing or 'none'}, unknown {unknown or 'none'}")
        self._scale = float(state["scale"])
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval, self._growth_tracker = state["growth_interval"], state["_growth_tracker"]
        self.hysteresis = state.get("hysteresis", self.hysteresis)
        self._hysteresis_left = state.get("_hysteresis_left", self.hysteresis)
        self.floor = state.get("floor", self.floor)


def _all_finite(grads: list[Array]) -> bool:
    """Whether no gradient holds an infinity or NaN; one answer is read back, so that a GPU waits once."""
    if not grads:
        return True
    xp = array_module(grads[0])
    return bool(to_host(xp.stack([xp.isfinite(g).all() for g in grads]).all()))
