"""Matrix products on a GPU by one function of cuBLAS, called directly, for what CuPy's `@` leaves out.

CuPy turns a stack of float16 matrices into float32 copies before it multiplies them, so that no tensor core has
part in attention; it copies transposed matrices of a stack; it uses TF32 for single matrices only; and it refuses
cuBLAS while a CUDA graph is captured (its issue 6290), though cuBLAS itself may be.
cublasGemmStridedBatchedEx does all of it: float16 is multiplied on tensor cores and added up in float32, a
transpose is a flag, and a product while capturing becomes a part of the graph.

cuBLAS has fast kernels only for rows that are multiples of 16 bytes long. A product with others, such as the logits
of a vocabulary of 50257, takes up to eight times as long, so in a large one they are copied to rows that zeros fill up.

cuBLAS counts columns first: to it a row-major matrix is its transpose. So C = A B is asked for as Cᵀ = Bᵀ Aᵀ, in
which every operand is what it already sees.

tests/gpu/test_gpu_blas.py carries the calls out in NumPy.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import sys
from typing import Any, NamedTuple

import numpy as np

from minipar.backend import array_module
from minipar.kernels.common import Array
from minipar.kernels.gpu_launch import copy_rows

CUDA_R_32F, CUDA_R_64F, CUDA_R_16F = 0, 1, 2  # cudaDataType
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77  # cublasComputeType_t
DEFAULT_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT
DTYPES = {"e": CUDA_R_16F, "f": CUDA_R_32F, "d": CUDA_R_64F}
ALIGNMENT = 16  # bytes
LARGE, WIDE = 2**29, 64  # multiplications of a product, and its smallest size, from which copies for alignment pay

INT, LONG, POINTER = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p
SIGNATURE: list[Any] = [
    POINTER, INT, INT, INT, INT, INT,  # handle, transa, transb, m, n, k
    POINTER, POINTER, INT, INT, LONG,  # alpha, A, its type, leading dimension and stride from matrix to matrix
    POINTER, INT, INT, LONG,  # B
    POINTER, POINTER, INT, INT, LONG,  # beta, C
    INT, INT, INT,  # how many matrices, compute type, algorithm
]  # fmt: skip


class Operand(NamedTuple):
    """A stack of matrices as cuBLAS takes it.

    Attributes:
        array: (..., rows, columns), itself or a copy that cuBLAS can read.
        transposed: whether cuBLAS must transpose what it sees to see what `array`'s transpose is.
        leading: elements from one column, as cuBLAS sees it, to the next.
        stride: elements from one matrix to the next; 0 repeats the first.
    """

    array: Array
    transposed: bool
    leading: int
    stride: int


def operand(x: Array) -> Operand:
    """Describe x (..., rows, columns) to cuBLAS; what does not lie as it needs is copied."""
    layout = _layout(x.shape, x.strides, x.itemsize)
    if layout is not None:
        return Operand(x, *layout)
    rows, columns = x.shape[-2:]
    return Operand(array_module(x).ascontiguousarray(x), False, columns, rows * columns)


@functools.lru_cache(4096)  # a step has the same few hundred layouts again and again
def _layout(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[bool, int, int] | None:
    """Return an operand's `transposed`, `leading` and `stride`; None if cuBLAS cannot read it as it lies."""
    rows, columns = shape[-2:]
    *outer, down, across = (s // itemsize for s in strides)
    stride = _stride(shape[:-2], outer)
    if stride is None:
        return None
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return False, columns if rows == 1 else down, stride
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return True, rows if columns == 1 else across, stride
    return None


def _stride(shape: tuple[int, ...], strides: list[int]) -> int | None:
    """Return the one stride by which the leading axes can be walked, None if it takes several."""
    axes = [(n, s) for n, s in zip(shape, strides) if n > 1]
    for (_, outer), (n, inner) in itertools.pairwise(axes):
        if outer != n * inner:
            return None
    return axes[-1][1] if axes else 0


def compute_type(char: str) -> int:
    """Return the precision in which products of a dtype add up; float32's is TF32 if CUPY_TF32 says so."""
    if char == "d":
        return COMPUTE_64F
    return COMPUTE_32F_FAST_TF32 if char == "f" and os.environ.get("CUPY_TF32", "0") != "0" else COMPUTE_32F


def arguments(a: Array, b: Array, out: Array, scale: float) -> tuple[tuple[Any, ...], Any]:
    """Return the arguments of out = scale · a @ b after the handle, and what must stay alive until the call is made.

    Args:
        a, b, out: (..., n, k), (..., k, m) and a contiguous (..., n, m), of one dtype and with the same leading axes.
    """
    n, k = a.shape[-2:]
    m, char = b.shape[-1], out.dtype.char
    left, right = operand(a), operand(b)
    scalar = ctypes.c_double if char == "d" else ctypes.c_float  # as the compute type
    factor, zero = scalar(scale), scalar(0)
    kind = DTYPES[char]
    call = (
        int(right.transposed), int(left.transposed), m, n, k,
        ctypes.addressof(factor), address(right.array), kind, right.leading, right.stride,
        address(left.array), kind, left.leading, left.stride,
        ctypes.addressof(zero), address(out), kind, m, n * m,
        math.prod(out.shape[:-2]), compute_type(char), DEFAULT_ALGORITHM,
    )  # fmt: skip
    return call, (left, right, factor, zero)


def address(x: Array) -> int:
    """Return where an array's first element lies."""
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)


def matmul(a: Array, b: Array, scale: float = 1.0) -> Array:
    """scale · a (..., n, k) @ b (..., k, m), leading axes broadcast; a vector is one row or column, as in NumPy.

    Dtypes that cuBLAS does not multiply go to CuPy. float16 is added up and scaled in float32 and rounded once.
    """
    xp = array_module(a)
    if a.dtype != b.dtype:
        dtype = np.result_type(a.dtype, b.dtype)
        a, b = a.astype(dtype, copy=False), b.astype(dtype, copy=False)
    dtype = a.dtype
    if dtype.char not in DTYPES:
        return a @ b if scale == 1 else scale * (a @ b)
    rows, columns = a if a.ndim > 1 else a[None, :], b if b.ndim > 1 else b[:, None]
    lead = rows.shape[:-2]
    if columns.shape[:-2] != lead:
        lead = np.broadcast_shapes(lead, columns.shape[:-2])
    shape = (*lead, rows.shape[-2], columns.shape[-1])
    if 0 in shape or rows.shape[-1] == 0:
        y = xp.zeros(shape, dtype)
    else:
        rows, columns = (x if x.shape[:-2] == lead else _repeated(x, lead) for x in (rows, columns))
        y = _product(xp, rows, columns, shape, scale)
    if b.ndim == 1:
        y = y[..., 0]
    return y[..., 0, :] if a.ndim == 1 and b.ndim > 1 else y[..., 0] if a.ndim == 1 else y


def _repeated(x: Array, lead: tuple[int, ...]) -> Array:
    return array_module(x).broadcast_to(x, (*lead, *x.shape[-2:]))


def _product(xp: Any, a: Array, b: Array, shape: tuple[int, ...], scale: float) -> Array:
    """scale · a (..., n, k) @ b (..., k, m), of equal leading axes and nothing empty, of a `shape` (..., n, m)."""
    if _pays(a, shape):
        return _filled_up(xp, a.reshape(a.shape[-2:]), b.reshape(b.shape[-2:]), scale).reshape(shape)
    y = xp.empty(shape, a.dtype)
    _multiply(a, b, y, scale)
    return y


def _multiply(a: Array, b: Array, out: Array, scale: float) -> None:
    call, alive = arguments(a, b, out, scale)
    gemm(*call)
    del alive  # CuPy's pool gives the memory of copies out again in the stream's order


def _pays(a: Array, shape: tuple[int, ...]) -> bool:
    """Return whether this is a large product of two matrices on tensor cores with a side that no fast kernel takes."""
    sizes, unit = (*shape, a.shape[-1]), ALIGNMENT // a.itemsize
    if not any(n % unit for n in sizes) or math.prod(shape[:-2]) > 1:
        return False
    tensor_cores = a.dtype.char == "e" or compute_type(a.dtype.char) == COMPUTE_32F_FAST_TF32
    return tensor_cores and min(sizes[-3:]) >= WIDE and math.prod(sizes) >= LARGE


def _filled_up(xp: Any, a: Array, b: Array, scale: float) -> Array:
    """scale · a (n, k) @ b (k, m), computed with sides that are multiples of 16 bytes, wherever they lie along rows."""
    (n, k), m, unit = a.shape, b.shape[1], ALIGNMENT // a.itemsize
    left, right = operand(a), operand(b)
    whole_n = _up(n, unit) if left.transposed else n
    whole_k = k if left.transposed and not right.transposed else _up(k, unit)
    whole_m = _up(m, unit)
    out = xp.empty((whole_n, whole_m), a.dtype)
    _multiply(_with_zeros(left, whole_n, whole_k), _with_zeros(right, whole_k, whole_m), out, scale)
    if whole_m == m:
        return out[:n]
    y = xp.empty((n, m), a.dtype)
    copy_rows(out[:n], y)
    return y


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _with_zeros(x: Operand, rows: int, columns: int) -> Array:
    """Return a matrix with zeros added on to a shape (rows, columns), as it lies if it has that shape."""
    size = x.array.itemsize
    if x.array.shape == (rows, columns) and not any(at % ALIGNMENT for at in (address(x.array), x.leading * size)):
        return x.array
    lines = x.array.T if x.transposed else x.array  # (lines, along), the latter side by side in memory
    copy = array_module(lines).empty((columns, rows) if x.transposed else (rows, columns), lines.dtype)
    copy_rows(lines, copy[: len(lines)])
    copy[len(lines) :] = 0
    return copy.T if x.transposed else copy


def contracts(subscripts: str) -> bool:
    """Return whether `contract` can do this: two operands, each letter in both of them or in the result."""
    operands, result = subscripts.split("->")
    left, *others = operands.split(",")
    if len(others) != 1:
        return False
    right = others[0]
    return set(left) <= {*right, *result} and set(right) <= {*left, *result}


def contract(subscripts: str, a: Array, b: Array) -> Array:
    """einsum of two operands as one product of stacks: letters in both and the result number the matrices."""
    operands, result = subscripts.split("->")
    left, right = operands.split(",")
    size = dict(zip(left + right, a.shape + b.shape))
    stack = [c for c in left if c in right and c in result]
    inner = [c for c in left if c in right and c not in result]
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]

    def matrices(x: Array, letters: str, *groups: list[str]) -> Array:
        turned = x.transpose([letters.index(c) for group in groups for c in group])
        return turned.reshape([math.prod(size[c] for c in group) for group in groups])

    y = matmul(matrices(a, left, stack, rows, inner), matrices(b, right, stack, inner, columns))
    found = stack + rows + columns
    return y.reshape([size[c] for c in found]).transpose([found.index(c) for c in result])


@functools.cache
def _library() -> Any:
    """cuBLAS as CuPy has loaded it: its module is linked to it, so its symbols are found through that.

    Asking CuPy for the module, and not importing it by its path, makes CuPy find the library first, wherever it was
    installed: from a wheel, the system's loader would not find it.
    """
    library = ctypes.CDLL(sys.modules["cupy"].cuda.cublas.__file__)
    library.cublasSetStream_v2.argtypes = [POINTER, POINTER]
    library.cublasGemmStridedBatchedEx.argtypes = SIGNATURE
    return library


def gemm(*call: Any) -> None:
    """Queue a product on the current stream.

    Raises:
        RuntimeError: cuBLAS refuses it.
    """
    cupy = sys.modules["cupy"]
    library, handle = _library(), cupy.cuda.device.get_cublas_handle()
    status = library.cublasSetStream_v2(handle, cupy.cuda.get_current_stream().ptr)
    status = status or library.cublasGemmStridedBatchedEx(handle, *call)
    if status:
        raise RuntimeError(f"cublasGemmStridedBatchedEx{call}: cublasStatus_t {status}")
