"""Mixed precision for the training job: autocast, scaler and policy as one thing, which may be off.

The order within a step is PyTorch's: scale, backward, unscale, clip, step or skip, update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from minipar import optim
from minipar.amp.autocast import autocast
from minipar.amp.policy import PolicyConfig, PrecisionPolicy
from minipar.amp.scaler import GradScaler
from minipar.errors import UsageError
from minipar.tensor import Tensor

if TYPE_CHECKING:  # comm stands above this floor: communicators come in as arguments
    from minipar.comm.interface import Communicator

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
MODES = ("off", *DTYPES)
SMALLEST_SCALE = 1.0  # a gradient that overflows unscaled is no matter of scaling


class MixedPrecision:
    """What a job needs of mixed precision.

    Args:
        amp: "off", "fp16" (with a loss scale) or "bf16" (without: it has float32's range).
        comm: all ranks that train together.
        loss_scale: a fixed scale; None adapts it.
        policy: thresholds by which single parameters stay in float32.

    Attributes:
        scaler: not enabled unless `amp` is "fp16".
        policy: None without one.
        skipped: steps that were not taken because a gradient overflowed.

    Raises:
        UsageError: an unknown `amp`.
    """

    def __init__(
        self,
        amp: str,
        comm: Communicator,
        loss_scale: float | None = None,
        policy: PolicyConfig | None = None,
    ):
        if amp not in MODES:
            raise UsageError(f"amp {amp!r} is unknown: use one of {', '.join(MODES)}")
        self._autocast = autocast(DTYPES[amp]) if amp != "off" else None
        scaled = amp == "fp16"
        if loss_scale is None:
            self.scaler = GradScaler(enabled=scaled, comm=comm, floor=SMALLEST_SCALE)
        else:  # the floor and an interval that never ends hold it where it is
            self.scaler = GradScaler(
                loss_scale, growth_interval=2**62, enabled=scaled, comm=comm, floor=loss_scale
            )
        self.policy = PrecisionPolicy(policy, comm) if policy is not None else None
        self.skipped = 0

    @property
    def observing(self) -> bool:
        """Whether the policy is still counting, so that everything computes in float32."""
        return self.policy is not None and self.policy.observing

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for forward and backward: one autocast for the whole run, or nothing."""
        if self._autocast is None:
            return contextlib.nullcontext()
        self._autocast.only_float32 = self.observing
        return self._autocast

    @property
    def copy_bytes(self) -> int:
        """Bytes of the parameters' copies in low precision."""
        return 0 if self._autocast is None else self._autocast.copy_bytes

    def divisor(self, count: int) -> float:
        """Return what to divide a sum of losses by: the global count over the loss scale, applied once."""
        return count / self.scaler.get_scale() if self.scaler.enabled else count

    def unscale(self, optimizer: optim.Optimizer) -> bool:
        """Unscale the gradients; return whether one of them overflowed, on any rank. Collective."""
        self.scaler.unscale_(optimizer)
        return self.scaler.found_inf(optimizer)

    def observe(self, pairs: Iterable[tuple[Any, Tensor]]) -> bool:
        """Let the policy see a step's unscaled gradients; return whether it has just decided. Collective."""
        if self.policy is None or not self.policy.observing:
            return False
        assert self._autocast is not None
        self.policy.observe(pairs)
        if not self.policy.complete:
            return False
        names = self.policy.decide(self.scaler.get_scale(), self._autocast.met)
        self._autocast.float32_parameters = names
        return True

    def policy_state(self) -> dict[str, Any] | None:
        """Return the policy's state in plain values, None without a policy. Collective."""
        if self.policy is None or self._autocast is None:
            return None
        return self.policy.state_dict(self._autocast.met)

    def load_policy_state(self, state: dict[str, Any] | None) -> None:
        """Go on from a `policy_state`. Without a policy there is none, and `state` is None."""
        if self.policy is None or self._autocast is None or state is None:
            return
        self._autocast.float32_parameters, met = self.policy.load_state_dict(state)
        self._autocast.met.update(met)

    def step(self, optimizer: optim.Optimizer, take: Callable[[], Any]) -> None:
        """Take the step by calling `take`, or skip it, and adapt the scale."""
        self.skipped += self.scaler.found_inf(optimizer)
        self.scaler.step(optimizer, take)
        self.scaler.update()
