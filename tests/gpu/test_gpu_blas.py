"""How matrix products are told to cuBLAS, checked without a GPU: a NumPy cuBLAS carries the calls out."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from minipar.kernels import gpu_blas

TYPES = {gpu_blas.CUDA_R_16F: np.float16, gpu_blas.CUDA_R_32F: np.float32, gpu_blas.CUDA_R_64F: np.float64}


def stack(where: int, kind: int, rows: int, columns: int, leading: int, stride: int, count: int) -> np.ndarray:
    """View memory as cuBLAS does: (count, rows, columns), columns first."""
    dtype = np.dtype(TYPES[kind])
    last = (count - 1) * stride + (columns - 1) * leading + rows
    flat = np.frombuffer((ctypes.c_char * (last * dtype.itemsize)).from_address(where), dtype)
    strides = tuple(s * dtype.itemsize for s in (stride, 1, leading))
    return np.lib.stride_tricks.as_strided(flat, (count, rows, columns), strides)


def numpy_gemm(
    ta: int, tb: int, m: int, n: int, k: int, alpha: int, a: int, akind: int, lda: int, astride: int,
    b: int, bkind: int, ldb: int, bstride: int, beta: int, c: int, ckind: int, ldc: int, cstride: int,
    count: int, compute: int, algorithm: int,
) -> None:  # fmt: skip
    """cublasGemmStridedBatchedEx by its manual: C = alpha · op(A) op(B) + beta · C, all columns first."""
    number = ctypes.c_double if compute == gpu_blas.COMPUTE_64F else ctypes.c_float
    assert number.from_address(beta).value == 0
    assert lda >= (k if ta else m) and ldb >= (n if tb else k) and ldc >= m, "cuBLAS refuses these"
    left = stack(a, akind, *((k, m) if ta else (m, k)), lda, astride, count)
    right = stack(b, bkind, *((n, k) if tb else (k, n)), ldb, bstride, count)
    left, right = (x.swapaxes(1, 2) if t else x for x, t in ((left, ta), (right, tb)))
    wide = np.float64 if compute == gpu_blas.COMPUTE_64F else np.float32
    product = left.astype(wide) @ right.astype(wide)
    stack(c, ckind, m, n, ldc, cstride, count)[...] = wide(number.from_address(alpha).value) * product


@pytest.fixture(autouse=True)
def by_numpy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def gemm(*call: Any) -> None:
        assert len(call) == len(gpu_blas.SIGNATURE) - 1, "all but the handle"
        calls.append(call)
        numpy_gemm(*call)

    monkeypatch.setattr(gpu_blas, "gemm", gemm)
    monkeypatch.setattr(gpu_blas, "copy_rows", numpy_copy_rows)
    return calls


def numpy_copy_rows(x: np.ndarray, out: np.ndarray) -> None:
    both = min(x.shape[1], out.shape[1])
    out[:, :both], out[:, both:] = x[:, :both], 0


def numbers(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


fused = numbers(2, 7, 3 * 4 * 5)  # (B, T, 3·H·D), as attention reads it in place
q, k = (fused.reshape(2, 7, 3, 4, 5).transpose(2, 0, 3, 1, 4)[i] for i in range(2))
PAIRS = {
    "matrices": (numbers(3, 4), numbers(4, 5)),
    "transposed left": (numbers(4, 3).T, numbers(4, 5)),
    "transposed right": (numbers(3, 4), numbers(5, 4).T),
    "both transposed": (numbers(4, 3).T, numbers(5, 4).T),
    "one row": (numbers(1, 4), numbers(4, 5)),
    "one column": (numbers(3, 4), numbers(4, 1)),
    "outer product": (numbers(3, 1), numbers(1, 5)),
    "a single number": (numbers(1, 4), numbers(4, 1)),
    "a column of a matrix": (numbers(3, 4), numbers(4, 6)[:, 2:3]),
    "a row of a matrix": (numbers(4, 6).T[2:3], numbers(4, 5)),
    "rows with a gap": (numbers(3, 9)[:, 2:6], numbers(8, 5)[::2]),
    "every other column": (numbers(3, 8)[:, ::2], numbers(4, 5)),
    "backwards": (numbers(3, 4)[::-1], numbers(4, 5)[:, ::-1]),
    "repeated": (np.broadcast_to(numbers(1, 4), (3, 4)), numbers(4, 5)),
    "stacks": (numbers(2, 6, 3, 4), numbers(2, 6, 4, 5)),
    "a stack and a transposed one": (numbers(2, 6, 3, 4), numbers(2, 6, 5, 4).swapaxes(-1, -2)),
    "a stack and a matrix": (numbers(2, 6, 3, 4), numbers(4, 5)),
    "stacks that broadcast": (numbers(2, 1, 3, 4), numbers(6, 4, 5)),
    "heads in place": (q, k.swapaxes(-1, -2)),
    "a stack of one": (numbers(1, 3, 4), numbers(1, 4, 5)),
    "a vector left": (numbers(4), numbers(4, 5)),
    "a vector right": (numbers(2, 3, 4), numbers(4)),
    "two vectors": (numbers(4), numbers(4)),
    "nothing to add up": (numbers(3, 0), numbers(0, 5)),
    "no rows": (numbers(0, 4), numbers(4, 5)),
}


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
@pytest.mark.parametrize("name", PAIRS)
def test_products_are_numpy_s(name: str, dtype: type) -> None:
    a, b = (x if dtype is np.float32 else x.astype(dtype) for x in PAIRS[name])
    want = a.astype(float) @ b.astype(float)
    got = gpu_blas.matmul(a, b)
    assert got.shape == want.shape and got.dtype == dtype
    tolerance = {np.float16: 2e-3, np.float32: 1e-6, np.float64: 1e-14}[dtype]
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max(initial=0)))


SINGLE = [name for name, (a, b) in PAIRS.items() if a.ndim == b.ndim == 2 or name == "a stack of one"]


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
@pytest.mark.parametrize("name", SINGLE)
def test_for_tensor_cores_all_that_lies_along_rows_is_a_multiple_of_16_bytes(
    name: str, dtype: type, by_numpy: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_TF32", "1")
    monkeypatch.setattr(gpu_blas, "LARGE", 1)
    monkeypatch.setattr(gpu_blas, "WIDE", 1)
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))  # zeros must be written
    test_products_are_numpy_s(name, dtype)
    for call in by_numpy if dtype is not np.float64 else ():
        ta, tb, m, n, k = call[:5]
        for along in (m, k if ta else m, n if tb else k, call[8], call[12], call[17]):
            assert along * np.dtype(dtype).itemsize % 16 == 0
        assert call[6] % 16 == call[10] % 16 == 0


def test_only_large_products_pay_for_copies(by_numpy: list[tuple[Any, ...]]) -> None:
    gpu_blas.matmul(np.ones((8, 9), np.float16), np.ones((9, 8), np.float16))
    assert by_numpy[0][12] == 9


def test_a_transpose_is_a_flag_and_heads_are_copied_once(by_numpy: list[tuple[Any, ...]]) -> None:
    a, b = numbers(3, 4), numbers(5, 4)
    gpu_blas.matmul(a, b.T)
    (call,) = by_numpy
    assert call[:5] == (1, 0, 5, 3, 4) and call[6] == b.ctypes.data and call[10] == a.ctypes.data
    assert gpu_blas.operand(q).array is not q, "batch and heads have two strides"


def test_halves_add_up_in_float32(by_numpy: list[tuple[Any, ...]]) -> None:
    """Ones and a term that a float16 sum would lose: 2048 + 1 is 2048 there."""
    got = gpu_blas.matmul(np.ones((2, 4098), np.float16), np.ones((4098, 3), np.float16))
    assert (got == np.float16(4098)).all()
    assert by_numpy[0][-2] == gpu_blas.COMPUTE_32F


def test_tf32_is_asked_for_by_cupy_s_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_TF32", "1")
    assert gpu_blas.compute_type("f") == gpu_blas.COMPUTE_32F_FAST_TF32
    assert gpu_blas.compute_type("e") == gpu_blas.COMPUTE_32F and gpu_blas.compute_type("d") == gpu_blas.COMPUTE_64F
    monkeypatch.setenv("CUPY_TF32", "0")
    assert gpu_blas.compute_type("f") == gpu_blas.COMPUTE_32F


def test_other_dtypes_and_mixtures() -> None:
    whole = np.arange(6).reshape(2, 3)
    assert np.array_equal(gpu_blas.matmul(whole, whole.T), whole @ whole.T)
    mixed = gpu_blas.matmul(np.ones((2, 3), np.float16), np.ones((3, 2), np.float32))
    assert mixed.dtype == np.float32 and (mixed == 3).all()


PATHS = ("ij,jk->ik", "ij,jk->ki", "bij,bjk->bik", "ib,bjk->kbij", "ijk,kj->i", "ij,ij->", "i,j->ji", "bhtd,bhsd->bhts")


@pytest.mark.parametrize("path", PATHS)
def test_contractions_are_einsum_s(path: str, by_numpy: list[tuple[Any, ...]]) -> None:
    lengths = {letter: n for n, letter in enumerate("bhijkstd", 2)}
    left, right = path.split("->")[0].split(",")
    a, b = (numbers(*(lengths[c] for c in letters), dtype=np.float64) for letters in (left, right))
    assert gpu_blas.contracts(path)
    np.testing.assert_allclose(gpu_blas.contract(path, a, b), np.einsum(path, a, b), atol=1e-12)
    assert len(by_numpy) == 1


@pytest.mark.parametrize("path", ("ij,jk->i", "ij->ji", "ij,jk,kl->il"))
def test_what_is_no_single_product_is_left_to_einsum(path: str) -> None:
    assert not gpu_blas.contracts(path)
