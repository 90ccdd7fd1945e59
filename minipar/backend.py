"""Where arrays live: NumPy on the CPU, CuPy on a GPU, one name for both.

Everything above this floor asks `array_module(x)` for the module that made `x` and then writes plain
array code. CuPy is imported only when a GPU is asked for, so a machine without one never pays for it.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from minipar.errors import UsageError

Array = npt.NDArray[Any]  # or a cupy.ndarray, which has the same interface

FLOAT_DTYPES = ("float16", "float32", "float64")


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this dtype can carry a gradient; to NumPy bfloat16 is foreign, of kind "V"."""
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.name == "bfloat16")


def array_module(x: Any) -> ModuleType:
    """Return `numpy` or `cupy`: the module whose array `x` is (NumPy for scalars and lists)."""
    if type(x) is np.ndarray:
        return np
    return sys.modules["cupy"] if is_gpu_array(x) else np


def contiguous(x: Array) -> Array:
    """Return x if it is C-contiguous, else a copy that is; a scalar keeps its shape (), unlike by NumPy's function."""
    if isinstance(x, np.generic):  # what NumPy makes of an array of no axes
        return np.asarray(x)
    return x if x.flags.c_contiguous else x.copy(order="C")


def is_gpu_array(x: Any) -> bool:
    """True for a CuPy array. CuPy is not imported to find out."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def special_functions(x: Any) -> ModuleType:
    """Return the module with `erf` and its kin for the array `x`: scipy.special or cupyx.scipy.special."""
    return importlib.import_module("cupyx.scipy.special" if is_gpu_array(x) else "scipy.special")


def synchronize(x: Any = None) -> None:
    """Wait until the GPU has finished what was queued on the current stream; nothing to do on the CPU.

    Called before anything but CuPy reads GPU memory (MPI, a clock): without it such a reader sees
    whatever the memory held before.
    """
    if is_gpu_array(x):
        sys.modules["cupy"].cuda.get_current_stream().synchronize()


def summand(x: Any) -> Any:
    """Return a one-element array's value to add up in float64: a Python number, or on a GPU a scalar array there.

    So a sum over microbatches waits for the GPU when it is read (`float`), and not at every term.
    """
    return x.astype("float64") if is_gpu_array(x) else x.item()


def to_host(x: Any) -> Array:
    """Return `x` as a NumPy array; a copy only when it lies on a GPU."""
    return sys.modules["cupy"].asnumpy(x) if is_gpu_array(x) else np.asarray(x)


def device_module(device: str) -> ModuleType:
    """Return the array module of a device name.

    Args:
        device: "cpu", "cuda", or "auto" (a GPU if there is one).

    Raises:
        UsageError: "cuda" was asked for and CuPy or a GPU is missing, or the name is unknown.
    """
    if device == "cpu":
        return np
    if device not in ("cuda", "auto"):
        raise UsageError(f"device {device!r} is unknown: use cpu, cuda or auto")
    try:
        import cupy
    except ImportError:
        if device == "auto":
            return np
        raise UsageError(
            "device cuda needs CuPy: pip install 'minipar[cuda12]' or 'minipar[cuda13]'"
        ) from None
    if cupy.is_available():
        return cupy  # type: ignore[no-any-return]
    if device == "auto":
        return np
    raise UsageError("device cuda: CuPy is installed but finds no GPU; use --device cpu")


def to_device(x: Any, device: str) -> Array:
    """Return `x` as an array on `device`; no copy when it is already there."""
    xp = device_module(device)
    return to_host(x) if xp is np else xp.asarray(x)


def float_dtype(name: Any) -> np.dtype[Any]:
    """Return the NumPy dtype of a floating type's name.

    Raises:
        UsageError: it is not one of float16, float32, float64.
    """
    try:
        dtype = np.dtype(name)
    except TypeError:
        dtype = None  # type: ignore[assignment]
    if dtype is None or dtype.name not in FLOAT_DTYPES:
        raise UsageError(f"dtype {name!r} is not a floating type here: use one of {', '.join(FLOAT_DTYPES)}")
    return dtype


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held at once so far (its resident set).

    On Linux `ru_maxrss` would begin with the peak of the process that started this one, which may be larger.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # it stands there in KiB
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory() -> int:
    """Return the most bytes that CuPy's memory pool has taken from the GPU so far, 0 where none is used.

    The pool keeps what is freed for the next array, so what it has is what was needed at once, and little more.
    Ranks that are threads of one process share it.
    """
    cupy = sys.modules.get("cupy")
    return 0 if cupy is None else int(cupy.get_default_memory_pool().total_bytes())


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, from malloc.h


def keep_freed_memory(megabytes: int = 1024) -> bool:
    """Let the C library reuse large freed arrays instead of returning them to the system (Linux, glibc).

    A training step allocates the same activations again and again. By default glibc maps every array
    over 32 MiB afresh and unmaps it at once, so each is paid for in page faults: the kernel zeroes
    every page before the first write. Kept memory is the CPU's counterpart of CuPy's memory pool.

    Returns:
        True where the setting exists and was taken.
    """
    limit = min(megabytes * 2**20, 2**31 - 1)
    # Older glibc refuses an mmap threshold above half its largest heap (32 MiB), so that is asked for next.
    return (_mallopt(MMAP_THRESHOLD, limit) or _mallopt(MMAP_THRESHOLD, 2**25)) and _mallopt(TRIM_THRESHOLD, limit)


def return_freed_memory(kilobytes: int = 256) -> bool:
    """Let the C library give freed arrays of this size and more back to the system at once (Linux, glibc).

    For a model that hardly fits, whose large arrays come and go (ZeRO stage 3): memory kept for the next one
    would be cut up by smaller arrays that stay, and what is held would grow far beyond what is in use.

    Returns:
        True where the setting exists and was taken.
    """
    return _mallopt(MMAP_THRESHOLD, kilobytes * 2**10)


def _mallopt(parameter: int, value: int) -> bool:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(parameter, value))
