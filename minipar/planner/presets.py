"""Machines by name, from data sheets: `preset("a100-80gb")`, `preset("h100", network="ethernet-100")`.

Data sheets give peaks, and a program reaches a part of them; `REACHED_…` says which, and where that is from. What
no data sheet has, the time to start things, stands below with its source, or as the assumption that it is. A
machine at hand is measured by `minipar calibrate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from minipar.errors import UsageError
from minipar.models import GPTConfig
from minipar.planner.machine import Link, Machine, Rate

# Parts of the peaks. Of products and memory: what `fit` finds, 0.747 and 0.697, from two of the ten runs of table 1 in
# Narayanan et al. 2021, the smallest (1.7 B, 137 TFLOP/s a GPU) and the largest (1 T, 163); the test of that table
# finds them anew, and holds the other eight against them. The table leans little on the other numbers here: with
# tiles of 1 to 128, starts of 0 to 128 steps, kernels of 0 to 10 µs, messages of 1 to 20 µs and links of 0.6 to 1.0
# of their peak, one at a time and fitted anew, the mean error of the eight stays within 2.6 and 3.5 %. Of links:
# NVLink of 450 GB/s gives 370 to NCCL, whose protocol costs about a fifth (S. Jeaugey of NVIDIA,
# github.com/NVIDIA/nccl-tests/issues/212, 2024).
REACHED_MATMUL, REACHED_MEMORY, REACHED_LINK = 0.75, 0.70, 0.80
# Blocks of a product and what starting one costs, in steps of the inner size: assumptions. cuBLAS has tiles of 64 to
# 256 ("tile quantization", NVIDIA, Matrix multiplication background, 2023); the smallest makes the least of it.
TENSOR_CORE_TILE, TENSOR_CORE_RAMP = 64, 64.0
# Seconds to start a kernel: an assumption within what is measured, 3.8 µs a kernel in a row of short ones and 9.6 with
# a wait after each, 2.9 of them the kernel itself (A. Gray of NVIDIA, "Getting started with CUDA graphs", 2019).
KERNEL_OVERHEAD = 5e-6
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: operations a second, bytes, bytes a second; the link inside a node, one direction."""

    source: str
    float16: float
    float32: float
    float64: float
    memory: float
    bandwidth: float
    link: float
    node_ranks: int = 8


GPUS: dict[str, Gpu] = {
    # float16 with tensor cores, dense; float32 with TF32 tensor cores where there are any. NVLink 2 of V100:
    # 300 GB/s in both directions together, NVLink 3 of A100: 600, NVLink 4 of H100: 900.
    "v100-32gb": Gpu("NVIDIA V100 data sheet (SXM2)", 125e12, 15.7e12, 7.8e12, 32 * GIB, 900e9, 150e9),
    "a100-40gb": Gpu("NVIDIA A100 data sheet (SXM4)", 312e12, 156e12, 19.5e12, 40 * GIB, 1555e9, 300e9),
    "a100-80gb": Gpu("NVIDIA A100 data sheet (SXM4)", 312e12, 156e12, 19.5e12, 80 * GIB, 2039e9, 300e9),
    "h100-80gb": Gpu("NVIDIA H100 data sheet (SXM5)", 989e12, 494e12, 67e12, 80 * GIB, 3350e9, 450e9),
    "h200-141gb": Gpu("NVIDIA H200 data sheet (SXM5)", 989e12, 494e12, 67e12, 141e9, 4800e9, 450e9),
    # Without NVLink a node's GPUs share PCI Express 4.0 × 16: 32 GB/s one way.
    "a100-pcie": Gpu("NVIDIA A100 data sheet (PCIe)", 312e12, 156e12, 19.5e12, 80 * GIB, 1935e9, 32e9),
}  # fmt: skip

NETWORKS: dict[str, tuple[float, float, str]] = {
    # Bytes a second a rank in one direction, seconds a message as an NCCL or MPI program sees it, source. The seconds
    # of InfiniBand lie within what NCCL itself reckons a step of a ring over the network with: 2.7, 4.0 and 14 µs by
    # protocol (hwLat in its src/graph/tuning.cc). Those of Ethernet are assumptions, of TCP through a
    # kernel and a switch or two.
    "infiniband-hdr": (25e9, 5e-6, "InfiniBand HDR: 200 Gbit/s a port, a port a GPU as in DGX A100"),
    "infiniband-ndr": (50e9, 5e-6, "InfiniBand NDR: 400 Gbit/s a port, a port a GPU as in DGX H100"),
    "infiniband-edr": (12.5e9, 5e-6, "InfiniBand EDR: 100 Gbit/s a port"),
    "ethernet-100": (12.5e9 / 8, 30e-6, "100 Gbit/s Ethernet a node, shared by 8 GPUs"),
    "ethernet-10": (1.25e9 / 8, 50e-6, "10 Gbit/s Ethernet a node, shared by 8 GPUs"),
}

NVLINK_ALPHA = 3e-6  # seconds a message within a node; NCCL reckons with 0.6, 1.9 and 3.4 µs (the same table)
USUAL_NETWORK = {"h100-80gb": "infiniband-ndr", "h200-141gb": "infiniband-ndr", "v100-32gb": "infiniband-edr"}


def preset(name: str, network: str | None = None) -> Machine:
    """Return a machine of these GPUs, 8 to a node, on this network (by default the usual one for them).

    Raises:
        UsageError: an unknown GPU or network; names those there are.
    """
    if name not in GPUS:
        raise UsageError(
            f"machine {name!r} is neither a file nor a preset; presets: {', '.join(GPUS)}."
            " For this machine: minipar calibrate"
        )
    network = network or USUAL_NETWORK.get(name, "infiniband-hdr")
    if network not in NETWORKS:
        raise UsageError(f"network {network!r} is unknown: use one of {', '.join(NETWORKS)}")
    gpu, (bandwidth, alpha, source) = GPUS[name], NETWORKS[network]
    peaks = {"float16": gpu.float16, "float32": gpu.float32, "float64": gpu.float64}
    return Machine(
        name=f"{name}, {network}", source=f"{gpu.source}; {source}", memory=gpu.memory,
        bandwidth=REACHED_MEMORY * gpu.bandwidth, overhead=KERNEL_OVERHEAD,
        matmul={
            p: Rate(peak, REACHED_MATMUL, TENSOR_CORE_TILE, TENSOR_CORE_RAMP) for p, peak in peaks.items()
        },
        node_ranks=gpu.node_ranks, node=Link(NVLINK_ALPHA, 1 / (REACHED_LINK * gpu.link)),
        cluster=Link(alpha, 1 / (REACHED_LINK * bandwidth)),
    )  # fmt: skip


# vocabulary, tokens, width, layers, heads
MODELS: dict[str, GPTConfig] = {
    # Radford et al. 2019, table 2.
    "gpt2": GPTConfig(50257, 1024, 768, 12, 12),
    "gpt2-xl": GPTConfig(50257, 1024, 1600, 48, 25),
    # Brown et al. 2020, table 2.1.
    "gpt3-6.7b": GPTConfig(50257, 2048, 4096, 32, 32),
    "gpt3-13b": GPTConfig(50257, 2048, 5120, 40, 40),
    "gpt-175b": GPTConfig(50257, 2048, 12288, 96, 96),
    # Narayanan et al. 2021, table 1.
    "megatron-18b": GPTConfig(51200, 2048, 6144, 40, 48),
    "megatron-145b": GPTConfig(51200, 2048, 12288, 80, 96),
    "megatron-530b": GPTConfig(51200, 2048, 20480, 105, 128),
    "megatron-1t": GPTConfig(51200, 2048, 25600, 128, 160),
}
BATCHES = {"gpt2": 512, "gpt2-xl": 512, "gpt3-6.7b": 1024, "gpt3-13b": 1024, "gpt-175b": 1536, "megatron-18b": 1024,
           "megatron-145b": 2304, "megatron-530b": 2520, "megatron-1t": 3072}  # fmt: skip
"""Samples of a batch: those of the papers, some 0.5 to 6 million tokens."""
