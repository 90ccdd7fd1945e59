"""A model whose gradients float16 cannot hold: it stalls without a loss scale, and learns with one."""

import importlib.util
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "precision.py"


def test_it_stalls_without_scaling_and_learns_with_it(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("precision_benchmark", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    full = benchmark.small_gradient_losses(amp=False, scaled=False)
    stalled = benchmark.small_gradient_losses(amp=True, scaled=False)
    learned = benchmark.small_gradient_losses(amp=True, scaled=True)
    assert stalled[-1] == 1.0, "every gradient is zero, so nothing moves"
    assert full[-1] < 0.2
    assert abs(learned[-1] - full[-1]) < 0.02
    benchmark.gradients(tmp_path)
    assert (tmp_path / "small_gradients.png").stat().st_size > 10_000
