"""Layouts that a job must refuse by name, for `test_layout_refusals` on threads and `mpi_verify` on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minipar.comm import Communicator
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.errors import UsageError
from minipar.training import Job
from minipar.verification import verify

GPT, MLP = {"model": "gpt"}, {"model": "mlp"}
ALONE = "lays out whole parameters itself: not with tensor parallelism, ZeRO or another aggregation"

# For three ranks: settings, and what the error says.
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {**GPT, "tp": 3, "heads": 4},
        "h.0.attn.c_attn.weight: 3 ranks do not divide 4 heads; 1, 2, 4 ranks would",
    ),
    ({**GPT, "tp": 2}, "mesh: pp 1 × tp 2 = 2 does not fit 3 ranks; for example --dp 3 --pp 1 --tp 1 would"),
    ({**MLP, "dp": 2}, "mesh: dp 2 × pp 1 × tp 1 = 2 does not fit 3 ranks"),
    (
        {**MLP, "partition": "devices", "devices": "1xA,1xB", "speeds": "A=1,B=2"},
        "devices '1xA,1xB' are 2, there are 3 ranks: give one for each",
    ),
    ({**MLP, "partition": "devices", "devices": "3xA", "memory": "B=1MiB"}, "memory for type B, which is not among"),
    ({**MLP, "partition": "cost", "layers": 2}, "3 devices for 2 blocks would leave a stage empty; use at most 2"),
    ({**MLP, "partition": "bytes", "tp": 3}, f"partition by bytes {ALONE}"),
    ({**MLP, "partition": "cost", "tp": 3}, f"partition by cost {ALONE}"),
    ({**MLP, "partition": "count", "zero": 1}, f"partition by count {ALONE}"),
    ({**MLP, "partition": "devices", "zero": 3}, f"partition by devices {ALONE}"),
    ({**MLP, "partition": "kind", "pp": 3}, "partition by kind with a pipeline is refused"),
    ({**MLP, "pp": 3, "layers": 2}, "pipeline: 2 blocks cannot fill 3 stages"),
    ({**MLP, "pp": 3, "zero": 2}, "ZeRO 2 with a pipeline is refused"),
    ({**GPT, "sequence_parallel": True}, "sequence parallelism cuts activations over tensor-parallel ranks"),
    ({**MLP, "zero": 1, "aggregation": "master"}, "ZeRO owns how gradients are summed; aggregation master does not"),
    ({**GPT, "heads": 3, "width": 48, "tp": 3, "aggregation": "master"}, "--aggregation master is about ranks that"),
    ({**GPT, "heads": 3, "width": 48, "tp": 3, "bucket_mb": 3.0}, "--bucket-mb is about ranks that share the batch"),
    ({**MLP, "pp": 3, "overlap": True}, "--overlap is about ranks that share the batch, and the other axes leave none"),
    (
        {"model": "convnet", "norm": "batch", "tp": 3, "convolution": "region"},
        "convolution cut region: batch norm is not offered over regions; use --norm group",
    ),
]


def refusal(settings: dict[str, Any], comm: Communicator, start: Callable[..., Any]) -> tuple[str, int]:
    """What a rank is told, and how many calls it has made on its communicator by then."""
    config = TrainConfig(**{"optimizer": "sgd", "device": "cpu", **settings}).resolved(VERIFY_DEFAULTS)
    comm.ledger.reset()
    try:
        start(config, comm)
    except UsageError as error:
        return str(error), comm.ledger.calls()
    return "nothing is refused", comm.ledger.calls()


def all_refusals(comm: Communicator) -> list[list[tuple[str, int]]]:
    """For each case what this rank is told by the training job and by `verify`."""
    return [[refusal(settings, comm, start) for start in (Job, verify)] for settings, _ in REFUSED]


def check(ranks: list[list[list[Any]]]) -> None:
    """Assert that every rank was told the same, and that nothing had been sent."""
    assert len(ranks) == 3
    for told in ranks:
        for (settings, said), answers in zip(REFUSED, told, strict=True):
            for message, calls in answers:
                assert said in message and "\n" not in message, (settings, message)
                assert calls == 0, settings
    assert ranks[0] == ranks[1] == ranks[2]
