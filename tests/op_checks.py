"""What every primitive is put through, whatever its subject."""

import numpy as np

from minipar.gradcheck import gradcheck
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
