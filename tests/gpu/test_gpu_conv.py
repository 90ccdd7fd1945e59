"""The products of the GPU's convolution without a GPU: NumPy unfolds, folds and carries cuBLAS's calls out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minipar.kernels import gpu_blas, gpu_conv, plain
from tests.gpu.kernel_cases import CASES
from tests.gpu.test_gpu_blas import numpy_gemm


def numpy_run(name: str, like: Any, *arguments: Any) -> None:
    """What gpu_source's code does, by the plain formulas."""
    if name == "add":
        a, b, out = arguments
        out[...] = a + b
        return
    source, n, c, h, w, *rest, out = arguments
    kernel, stride, padding, dilation, size = (tuple(rest[i : i + 2]) for i in range(0, 10, 2))
    if name == "unfold":
        columns = plain.im2col(source, kernel, stride, padding, dilation).reshape(n, c, *kernel, *size)
        out[...] = columns.transpose(1, 2, 3, 0, 4, 5)
    else:
        assert name == "fold"
        columns = source.reshape(c, *kernel, n, *size).transpose(3, 0, 1, 2, 4, 5)
        columns = columns.reshape(n, -1, size[0] * size[1])
        out[...] = plain.col2im(columns, (n, c, h, w), kernel, stride, padding, dilation)


@pytest.mark.parametrize("dtype", ("float32", "float64", "float16"))
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("conv2d")])
def test_convolution_is_the_plain_formula(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_blas, "gemm", lambda *call: numpy_gemm(*call))
    monkeypatch.setattr(gpu_conv, "run", numpy_run)
    arguments, options, tolerance = CASES[name](dtype)
    kernel = name.split(",")[0]
    got, want = (getattr(module, kernel)(*arguments, **options) for module in (gpu_conv, plain))
    for a, b in zip(got, want) if isinstance(got, tuple) else [(got, want)]:
        if b is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=0, atol=tolerance * np.abs(b).max())
