"""Many parameters in one flat array, which an optimizer steps as one tensor: one kernel instead of hundreds.

    optimizer = AdamW([FlatTensor(model.parameters())])

On a GPU a small kernel costs more to launch than to run, and a model has hundreds of small parameters. The
parameters become views of one array, their gradients views of another, so nothing is gathered or scattered at the
step; every element is computed as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from minipar.backend import Array, array_module
from minipar.errors import UsageError
from minipar.tensor import Tensor


class FlatTensor(Tensor):
    """The parameters of one optimizer group as a single tensor of shape (n,), of which they become views.

    Args:
        members: parameters with values, of one dtype, on one device. Their values stay; the gradients that
            they have are forgotten, and the next ones are written into one flat array.

    Raises:
        UsageError: no members, one that is listed twice or has no memory of its own, or several dtypes or devices.
    """

    def __init__(self, members: Iterable[Tensor]):
        self.members = list(members)
        self._version = 0
        if not self.members:
            raise UsageError("FlatTensor: no parameters to lay flat")
        if len({id(m) for m in self.members}) != len(self.members):
            raise UsageError("FlatTensor: a parameter is listed twice")
        kinds = {(array_module(m.data).__name__, m.dtype.name) for m in self.members}
        if len(kinds) > 1:
            told = ", ".join(f"{dtype} in {module}" for module, dtype in sorted(kinds))
            raise UsageError(f"FlatTensor: parameters must be of one dtype on one device, got {told}")
        if any(m.grad_buffer is not None for m in self.members):
            raise UsageError(
                "FlatTensor: a parameter's gradient has its place already (a bucket, or another FlatTensor): lay"
                " parameters flat before they are distributed, and once"
            )
        xp = array_module(self.members[0].data)
        super().__init__(xp.concatenate([m.data.reshape(-1) for m in self.members]), requires_grad=True)
        self._gradient = xp.zeros_like(self.data)
        stops = np.cumsum([0, *(m.size for m in self.members)]).tolist()
        self._views: list[Array] = []
        for m, (start, stop) in zip(self.members, pairwise(stops)):
            shape = m.shape
            m.data = self.data[start:stop].reshape(shape)
            m.grad_buffer = self._gradient[start:stop].reshape(shape)
            self._views.append(m.grad_buffer)

    @property
    def grad(self) -> Array | None:  # type: ignore[override]
        """The members' gradients as one array; None if none of them has one.

        Raises:
            UsageError: some have one and others have not, for which an optimizer would take it to be zero.
        """
        missing = [m for m in self.members if m.grad is None]
        if len(missing) == len(self.members):
            return None
        if missing:
            name = getattr(missing[0], "name", "") or f"of shape {missing[0].shape}"
            raise UsageError(
                f"FlatTensor: {len(missing)} of {len(self.members)} parameters have no gradient, the first is"
                f" {name}: a parameter that a step may leave out must be stepped by itself"
            )
        for m, view in zip(self.members, self._views):
            if m.grad is not view:
                view[...] = m.grad  # it was computed elsewhere: in a bucket, or by hand
                m.grad = view
        return self._gradient

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is None:
            for m in self.members:
                m.grad = None
            return
        if value is not self._gradient:
            self._gradient[...] = value
        for m, view in zip(self.members, self._views):
            m.grad = view

    @property
    def version(self) -> int:  # type: ignore[override]
        """Counts the changes; each is one of every member, too."""
        return self._version

    @version.setter
    def version(self, value: int) -> None:
        for m in self.members:
            m.version += value - self._version
        self._version = value
