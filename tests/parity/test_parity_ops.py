"""Every operation that PyTorch has: the same values and gradients, in float32 and float64."""

import numpy as np
import pytest

from minipar.tensor import Tensor
from tests.op_cases import ALL, listed

torch = pytest.importorskip("torch", reason="parity tests need PyTorch: pip install 'minipar[parity]'")
pytestmark = pytest.mark.parity

WITH_TORCH = {name: [c for c in cases if c.torch is not None] for name, cases in ALL.items()}
OURS_ALONE = {"astype", "dropout"}  # a test of dropout against PyTorch would compare two random masks


def test_every_operation_is_compared():
    assert {name for name, cases in WITH_TORCH.items() if not cases} == OURS_ALONE


@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("name, case", listed(WITH_TORCH))
def test_equals_pytorch(name, case, dtype, tol):
    arrays = case.inputs(dtype)
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    mine, other = case.fn(*ours), case.torch(torch, *theirs)
    mine, other = (v if isinstance(v, tuple | list) else (v,) for v in (mine, other))
    assert len(mine) == len(other)
    rng = np.random.default_rng(1)
    weights = [np.asarray(rng.standard_normal(v.shape), dtype) for v in mine]
    for a, b in zip(mine, other):
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a.data, b.detach().numpy(), rtol=tol, atol=tol)
    sum((v * w).sum() for v, w in zip(mine, weights)).backward()
    sum((v * torch.tensor(w)).sum() for v, w in zip(other, weights)).backward()
    for a, b in zip(ours, theirs):
        scale = max(float(np.abs(b.grad.numpy()).max(initial=0)), 1.0)
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=tol, atol=tol * scale)
