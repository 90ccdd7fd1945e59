"""The precision policy: which parameters compute in float16, decided by what is seen of them.

For some steps everything runs in float32 (what float16 would lose could not be seen in float16), and the
exponents of every parameter's values and gradients are counted. Then each parameter is decided on, once:
float32 if float16 would lose too much of its values or of its scaled gradient, else float16. Parameters of
one layer share an operation, so one that must be float32 takes the layer's others with it.

Counts are integers, summed over all ranks, so every rank decides the same.
"""

from __future__ import annotations

import fnmatch
import json
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minipar.amp.histogram import ExponentHistogram
from minipar.errors import UsageError
from minipar.tensor import Tensor

if TYPE_CHECKING:  # comm stands above this floor: communicators come in as arguments
    from minipar.comm.interface import Communicator


@dataclass(frozen=True)
class PolicyConfig:
    """The thresholds: the largest share of a parameter's non-zero elements that float16 may lose.

    Attributes:
        observe: steps that run in float32 and are counted before anything is decided.
        value_underflow: share of values that vanish (magnitude below 2^-25). It may be large: such a value is
            lost beside its neighbours anyway, and an attention key's bias is only ever that small.
        value_overflow: share of values that become infinite (2^16 and above).
        gradient_underflow: share of gradient elements that vanish though multiplied by the loss scale.
        gradient_overflow: share of gradient elements that become infinite when multiplied by the loss scale.
        float32: patterns of names that stay in float32 in any case, such as "h.0.*".
    """

    observe: int = 5
    value_underflow: float = 0.5
    value_overflow: float = 0.0
    gradient_underflow: float = 0.05
    gradient_overflow: float = 0.0
    float32: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> PolicyConfig:
        """Return the thresholds of a file, .json or .toml, with these attributes' names as keys.

        Raises:
            UsageError: a file that cannot be read, an unknown key, or a value out of range.
        """
        path = Path(path)
        try:
            text = path.read_text()
            found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise UsageError(f"precision policy {path} cannot be read: {error.strerror}") from None
        except ValueError as error:  # both decoders' errors, and text that is no UTF-8
            kind = "TOML" if path.suffix == ".toml" else "JSON"
            raise UsageError(f"precision policy {path} is no valid {kind}: {error}") from None
        if not isinstance(found, dict):
            raise UsageError(f"precision policy {path} must be a table of keys, not a {type(found).__name__}")
        known = [f.name for f in fields(cls)]
        for key in found:
            if key not in known:
                raise UsageError(
                    f"precision policy {path}: key {key!r} is unknown; known: {', '.join(known)}"
                )
        patterns = found.get("float32", [])
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise UsageError(f"precision policy {path}: float32 must be a list of name patterns")
        observe = found.get("observe", 5)
        if type(observe) is not int or observe < 1:
            raise UsageError(
                f"precision policy {path}: observe is {observe!r}, it must be a whole number from 1"
            )
        for key, value in found.items():
            if key in ("observe", "float32"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UsageError(
                    f"precision policy {path}: {key} is {value!r}, it must be a share from 0 to 1"
                )
        return cls(**{**found, "float32": tuple(patterns)})


@dataclass(frozen=True)
class Decision:
    """What was decided on one parameter.

    Attributes:
        name: the parameter's path in the serial model.
        dtype: "float16" or "float32": what operations that use it compute in.
        reason: why, in words and numbers.
    """

    name: str
    dtype: str
    reason: str


class PrecisionPolicy:
    """Counts exponents for some steps, then decides.

    Args:
        config: the thresholds.
        comm: all ranks that train together; None for one rank.

    Attributes:
        values, gradients: histograms by parameter name; after `decide`, those of the whole model.
        decisions: by parameter name; empty until `decide`.
        scale: the loss scale that `decide` was given.
    """

    def __init__(self, config: PolicyConfig | None = None, comm: Communicator | None = None):
        self.config, self.comm = config or PolicyConfig(), comm
        self.values: dict[str, ExponentHistogram] = {}
        self.gradients: dict[str, ExponentHistogram] = {}
        self.decisions: dict[str, Decision] = {}
        self.steps, self.scale = 0, 1.0

    @property
    def observing(self) -> bool:
        """Whether nothing is decided yet."""
        return not self.decisions

    @property
    def complete(self) -> bool:
        """Whether enough steps have been seen to decide."""
        return self.steps >= self.config.observe

    def observe(self, pairs: Iterable[tuple[Any, Tensor]]) -> None:
        """Count one step, before the optimizer's.

        Args:
            pairs: (parameter, what this rank holds of it with the *unscaled* gradient), each element equally
                often over all ranks, as `Strategy.optimizer_tensors` gives them.
        """
        for p, t in pairs:
            if not t.size:
                continue
            self.values.setdefault(p.name, ExponentHistogram()).add(t.data)
            gradient = self.gradients.setdefault(p.name, ExponentHistogram())
            if t.grad is not None:
                gradient.add(t.grad)
        self.steps += 1

    def decide(self, scale: float, used: Iterable[str]) -> frozenset[str]:
        """Decide on every parameter; return the names of those that stay in float32. Collective.

        Args:
            scale: the loss scale that gradients will be multiplied by.
            used: names of the parameters that low-precision operations have used on this rank.
        """
        self.scale = scale
        low = self._summed(set(used)) - {""}
        alone = {name: self._decide(name, name in low) for name in self.values}
        for name, found in alone.items():
            layer = name.rpartition(".")[0]
            leader = next(
                (
                    d
                    for d in alone.values()
                    if d.dtype == "float32" and d.name in low and d.name.rpartition(".")[0] == layer
                ),
                found,
            )
            if found.dtype == "float16" and leader.dtype == "float32":
                found = Decision(name, "float32", f"shares its layer's operation with {leader.name}")
            self.decisions[name] = found
        return self.float32_names()

    def _summed(self, used: set[str]) -> set[str]:
        """Make the histograms those of all ranks; return what any rank has used in low precision."""
        if self.comm is None or self.comm.size == 1:
            return used
        everyone = self.comm.all_gather_object((sorted(self.values), sorted(used)))
        names = sorted({name for names, _ in everyone for name in names})
        nothing = ExponentHistogram()
        mine = np.stack([
            [kind.get(name, nothing).counts for kind in (self.values, self.gradients)] for name in names
        ])  # (parameters, 2, BINS + 2)  # fmt: skip
        total = self.comm.all_reduce(mine)
        self.values = {name: ExponentHistogram(counts[0]) for name, counts in zip(names, total)}
        self.gradients = {name: ExponentHistogram(counts[1]) for name, counts in zip(names, total)}
        return {name for _, found in everyone for name in found}

    def _decide(self, name: str, used: bool) -> Decision:
        c, value, gradient = self.config, self.values[name], self.gradients[name]
        for pattern in c.float32:
            if fnmatch.fnmatchcase(name, pattern):
                return Decision(name, "float32", f"the policy file says so: {pattern}")
        if not used:
            return Decision(name, "float32", "no low-precision operation uses it")
        s = self.scale
        tests = (
            ("values overflow", value.overflowing(), c.value_overflow),
            ("values vanish", value.vanishing(), c.value_underflow),
            (f"gradients overflow at scale {s:g}", gradient.overflowing(s), c.gradient_overflow),
            (f"gradients vanish at scale {s:g}", gradient.vanishing(s), c.gradient_underflow),
        )
        for what, share, limit in tests:
            if share > limit:
                return Decision(name, "float32", f"{share:.2%} of {what}, allowed {limit:.2%}")
        if not gradient.nonzero:
            return Decision(name, "float16", "its gradient was zero in every step seen")
        lost = gradient.vanishing(s)
        return Decision(
            name,
            "float16",
            f"{lost:.2%} of gradients vanish at scale {s:g}, {gradient.vanishing():.2%} unscaled",
        )

    def state_dict(self, used: Iterable[str]) -> dict[str, Any]:
        """Return what has been counted and decided, over all ranks, in plain values. Collective.

        Args:
            used: as of `decide`; it matters while nothing is decided.
        """
        if self.observing:
            counted = PrecisionPolicy(self.config, self.comm)  # this rank goes on with its own counts
            counted.values, counted.gradients = self.values, self.gradients
            used = sorted(counted._summed(set(used)))
        else:  # these are the whole model's since `decide`
            counted, used = self, []
        return {
            "config": asdict(self.config), "steps": self.steps, "scale": self.scale, "used": used,
            "values": {name: h.state() for name, h in counted.values.items()},
            "gradients": {name: h.state() for name, h in counted.gradients.items()},
            "decisions": [asdict(decision) for decision in self.decisions.values()],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> tuple[frozenset[str], set[str]]:
        """Go on from a `state_dict`, on any number of ranks.

        Every replica counts. Resumed on another layout while counting, the steps before and after have another
        weight in the shares that are decided on, no more.

        Returns:
            Names of the parameters that stay in float32, and of those that low-precision operations have used.

        Raises:
            UsageError: it was made with other thresholds.
        """
        config = PolicyConfig(**{**state["config"], "float32": tuple(state["config"]["float32"])})
        if config != self.config:
            raise UsageError(f"the precision policy has other thresholds than the saved run's: {config}; give those")
        self.steps, self.scale = state["steps"], state["scale"]
        self.decisions = {d["name"]: Decision(**d) for d in state["decisions"]}
        alone = self.comm is None or self.comm.rank == 0  # while counting goes on one rank holds the sums so far
        for kind, saved in ((self.values, state["values"]), (self.gradients, state["gradients"])):
            kind.clear()
            for name, counts in saved.items() if alone or not self.observing else ():
                kind[name] = ExponentHistogram.from_state(counts)
        return self.float32_names(), set(state["used"])

    def float32_names(self) -> frozenset[str]:
        """Return the names of the parameters that were decided to stay in float32."""
        return frozenset(d.name for d in self.decisions.values() if d.dtype == "float32")

    def table(self) -> str:
        """Return one line a parameter: name, precision, reason."""
        rows = [
            ("parameter", "computes in", "because"),
            *((d.name, d.dtype, d.reason) for d in self.decisions.values()),
        ]
        name, dtype = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:<{name}}  {b:<{dtype}}  {c}" for a, b, c in rows)

    __str__ = table
