"""Without a GPU: what every kernel launches, on a CuPy whose functions check what they are given and do nothing."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
import pytest

from minipar.kernels import gpu, gpu_blas, gpu_launch
from minipar.kernels.gpu_source import FUNCTIONS, NUMBERS, ROWS, SUMS
from tests.gpu.kernel_cases import CASES

C_TYPES = {"__half": np.float16, "float": np.float32, "double": np.float64, "long long": np.int64}


class RawKernel:
    """A CUDA function: reads its parameters off the source, and compares the arguments of each call with them."""

    launched: ClassVar[list[str]] = []

    def __init__(self, source: str, name: str):
        self.name, self.types = name, C_TYPES | {"W": np.float32}
        for c_type, letter in re.findall(r"typedef (\w+) (\w);", source):
            self.types[letter] = C_TYPES[c_type]
        found = re.search(rf"{name}\((.*?)\) {{", source)
        assert found
        pattern = r"(?:const )?(.+?)(\*?)(?: __restrict__)? (\w+)"  # type, whether an array, name
        self.parameters = [re.fullmatch(pattern, parameter) for parameter in found[1].split(", ")]

    def __call__(self, blocks: tuple[int, ...], threads: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        assert min(*blocks, *threads) >= 1 and np.prod(threads) <= 1024 and max((0, *blocks[1:])) < 2**16
        assert len(arguments) == len(self.parameters), self.name
        for parameter, argument in zip(self.parameters, arguments):
            assert parameter
            kind = self.types[parameter[1]]
            if parameter[2]:
                assert isinstance(argument, np.ndarray) and argument.dtype == kind, f"{self.name}: {parameter[3]}"
            else:
                whole = isinstance(argument, (int, np.integer))
                assert whole if kind is np.int64 else type(argument) is kind, f"{self.name}: {parameter[3]}"
        self.launched.append(self.name)


class Cupy:
    """NumPy, with CuPy's kernels."""

    RawKernel = RawKernel

    def ElementwiseKernel(self, *source: str, preamble: str) -> Any:
        return lambda *arguments: np.zeros(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@pytest.fixture(autouse=True)
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    for module in (gpu, gpu_launch):
        monkeypatch.setattr(module, "device_module", lambda device: Cupy())
    monkeypatch.setattr(gpu_blas, "gemm", lambda *call: None)
    monkeypatch.setattr(gpu, "contiguous", np.ascontiguousarray)
    monkeypatch.setattr(gpu, "copy", lambda x, out: np.copyto(out, x))
    monkeypatch.setattr(RawKernel, "launched", [])
    for cached in (gpu_launch._function, gpu_launch._elementwise):
        cached.cache_clear()
    yield
    for cached in (gpu_launch._function, gpu_launch._elementwise):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", ("float32", "float64", "float16"))
@pytest.mark.parametrize("name", CASES)
def test_functions_get_the_arguments_that_they_name(name: str, dtype: str) -> None:
    arguments, options, _ = CASES[name](dtype)
    getattr(gpu, name.split(",")[0])(*arguments, **options)


def test_every_function_is_launched_by_some_case() -> None:
    for name, case in CASES.items():
        arguments, options, _ = case("float16")
        getattr(gpu, name.split(",")[0])(*arguments, **options)
    unused = set(FUNCTIONS) - {name.removeprefix("minipar_") for name in RawKernel.launched} - {"copy_rows"}
    assert not unused and set(FUNCTIONS) == {*NUMBERS, *ROWS, *SUMS}


@pytest.mark.parametrize("rows", (1, 64, 65, 8192))
def test_a_sum_of_many_rows_takes_two_steps(rows: int) -> None:
    x = np.ones((rows, 40), np.float16)
    assert gpu_launch.sum_rows("sum", {"T": x}, x).shape == (40,)
    assert RawKernel.launched == ["minipar_sum"] * (1 if rows <= 64 else 2)


def test_no_numbers_no_launch() -> None:
    assert gpu.gelu(np.ones((0, 3), np.float32)).shape == (0, 3)
    assert not RawKernel.launched
