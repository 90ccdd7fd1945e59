"""Small models for pipeline runs, and their proof against the serial run."""

from __future__ import annotations

from typing import Any

import minipar
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.verification import Report, verify

GPT = dict(model="gpt", seq_len=6, width=16, layers=6, heads=2, batch=9)
SIZES: dict[str, dict[str, Any]] = {
    "gpt": GPT,
    "untied": {**GPT, "tied": False},
    "mlp": dict(model="mlp", width=12, layers=8, batch=9),
    "convnet": dict(model="convnet", width=8, layers=6, batch=9),
    "patchnet": dict(model="patchnet", width=6, layers=3, patch=2, batch=5),
}
EIGHT = dict(heads=8, width=16, layers=16, batch=6, seq_len=4)  # a GPT that eight ranks can cut in any way


def settings(kind: str, **options: Any) -> TrainConfig:
    """Return resolved settings of a small model for a proof of two steps."""
    fixed = dict(optimizer="sgd", dtype="float64", device="cpu", steps=2)
    return TrainConfig(**{**fixed, **SIZES[kind], **options}).resolved(VERIFY_DEFAULTS)


def prove(ranks: int, kind: str, **options: Any) -> Report:
    """Run serially and on rank-threads; the report must hold."""
    config = settings(kind, **options)
    report: Report = minipar.launch(lambda: verify(config, minipar.world()), ranks, timeout=30)[0]
    assert report.holds, (ranks, kind, options, report)
    return report
