"""What can be said of the GPU kernels without a GPU: names, parameters, and that importing them needs no CuPy."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest

from minipar.errors import UsageError
from minipar.kernels import gpu, plain
from minipar.kernels.gpu_launch import run_rows
from minipar.kernels.gpu_source import ELEMENTWISE, NUMBERS, PREAMBLE, ROWS, SUMS
from tests.gpu.kernel_cases import CASES

TYPES = {"int32", "int64", "float32"}


def parameters(text: str) -> list[tuple[str, str]]:
    return [tuple(part.format(W="float32").removeprefix("raw ").split()) for part in re.split(r",\s*", text.strip())]


def test_importing_the_gpu_kernels_needs_no_cupy() -> None:
    program = "import minipar.kernels.gpu, minipar.kernels.gpu_graph, sys; assert 'cupy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_same_names_and_arguments_as_the_plain_ones() -> None:
    assert sorted(gpu.__all__) == sorted(plain.__all__)
    for name in plain.__all__:
        ours, theirs = (list(inspect.signature(getattr(m, name)).parameters) for m in (gpu, plain))
        assert ours == [p for p in theirs if p != "xp" or getattr(gpu, name) is getattr(plain, name)], name


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_parameters_are_typed_and_used(name: str) -> None:
    source = ELEMENTWISE[name]
    for kind, parameter in parameters(source.inputs) + parameters(source.outputs):
        assert kind in TYPES or re.fullmatch("[A-VX-Z]", kind), kind  # W is the working precision's own name
        assert re.search(rf"\b{parameter}\b", source.code), f"{parameter} is not used"
        assert parameter not in ("n", "i") and not parameter.startswith("_")  # CuPy's own
    assert source.code.count("(") == source.code.count(")") and source.code.endswith(";")


@pytest.mark.parametrize("name", [*NUMBERS, *ROWS, *SUMS])
def test_parameters_of_functions_are_typed_and_used(name: str) -> None:
    source = (NUMBERS | ROWS | SUMS)[name]
    code = source[1]
    for parameter in source.parameters.split(", "):
        found = re.fullmatch(r"(?:const )?([A-Z]|long long)(\*?) (\w+)", parameter)
        assert found, parameter
        assert re.search(rf"\b{found[3]}\b", code), f"{parameter} is not used"
        assert found[3] not in ("rows", "width", "row", "at", "out", "column", "total")  # every function's own
    for left, right in ("()", "{}", "[]"):
        assert code.count(left) == code.count(right)


def test_every_fused_kernel_has_a_case() -> None:
    fused = {name for name in gpu.__all__ if getattr(gpu, name) is not getattr(plain, name)} - {"dropout_mask"}
    assert {name.split(",")[0] for name in CASES} == fused


def test_the_preamble_takes_a_precision() -> None:
    assert "typedef double W;" in PREAMBLE % {"work": "double"}


def test_without_a_gpu_they_say_what_is_missing() -> None:
    from tests.gpu.device import REASON

    if REASON is None:
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="device cuda"):
        gpu.softmax(np.ones((2, 2)), -1)


def test_arrays_of_rows_must_be_contiguous() -> None:
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="softmax: its arrays must be contiguous"):
        run_rows("softmax", {"T": x}, x[:, ::2], x, 0)
