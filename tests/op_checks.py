"""What every primitive is put through, whatever its subject; and small tensors to do it with."""

import numpy as np

from minipar.gradcheck import gradcheck
from minipar.nn import Parameter
from minipar.nn.init import Normal
from minipar.tensor import Tensor
from tests.op_cases import Case


def check_gradient(case: Case) -> None:
    """Backward against central differences in float64."""
    gradcheck(case.fn, case.inputs(), tol=2e-7)


def check_dtypes(case: Case, dtype) -> None:
    """Values and gradients keep the inputs' dtype; gradients are memory of their own."""
    tensors = [Tensor(a, requires_grad=True) for a in case.inputs(dtype)]
    out = case.fn(*tensors)
    outs = out if isinstance(out, tuple) else (out,)
    assert {o.dtype for o in outs} == {np.dtype(dtype)}
    total = sum(((o * 0.5).sum() for o in outs[1:]), start=(outs[0] * 0.5).sum())
    assert total.dtype == dtype
    total.backward()
    for i, t in enumerate(tensors):
        assert isinstance(t.grad, np.ndarray), f"input {i} has no gradient"
        assert t.grad.dtype == dtype, f"input {i}: gradient of dtype {t.grad.dtype}"
        assert t.grad.shape == t.shape
        assert t.grad.flags.writeable
        assert not any(np.shares_memory(t.grad, other.data) for other in [*tensors, *outs])
        assert not any(np.shares_memory(t.grad, other.grad) for other in tensors[:i])


def leaf(*shape: int, seed: int = 0) -> Tensor:
    """A float64 tensor that wants a gradient."""
    return Tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


def weight(*shape: int, seed: int = 0) -> Parameter:
    """A float64 parameter: unlike a mere leaf, its gradient may be put off."""
    p = Parameter(shape, Normal())
    p.materialize(seed, f"w{shape}", "float64")
    return p
