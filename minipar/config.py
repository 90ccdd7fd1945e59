"""The training job's settings: one dataclass, from which the command line's options are made.

A setting that has no meaning for a model is refused when it is given, never ignored. Whether those of a layout go
with each other is for `parallel.distribute.Recipe` to say.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from minipar.amp.mixed import MODES as AMP_MODES
from minipar.backend import FLOAT_DTYPES
from minipar.data.tiles import parse_tiles
from minipar.errors import UsageError
from minipar.parallel.buckets import BUCKET_MB
from minipar.parallel.data_parallel import ALL_AGGREGATIONS
from minipar.parallel.partition.policies import POLICIES
from minipar.parallel.pipeline.resolve import DEFAULT_SCHEDULE
from minipar.parallel.pipeline.schedules import SCHEDULES

MODELS = ("mlp", "convnet", "gpt", "patchnet")
OPTIMIZERS = ("adamw", "adam", "sgd")
STAGED_POLICIES = ("cost", "devices")  # these place whole blocks, one stage a rank


def _option(
    default: Any, help: str, *, models: tuple[str, ...] = MODELS, choices: tuple[str, ...] = ()
) -> Any:
    return field(default=default, metadata={"help": help, "models": models, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run. None means the model's own default (see `DEFAULTS`)."""

    model: str = "gpt"
    data: str | None = _option(None, "docs, digits, or a path: a text file, an IDX or CIFAR-10 folder")
    steps: int | None = _option(None, "optimizer steps")
    batch: int | None = _option(None, "samples in the global batch, over all ranks")
    seq_len: int | None = _option(None, "tokens in a sample", models=("gpt",))
    vocab: int | None = _option(
        None, "size of the vocabulary; ids above the data's are never met [default: the data's]", models=("gpt",)
    )
    width: int | None = _option(None, "channels of the hidden layers")
    layers: int | None = _option(None, "hidden layers, residual blocks or transformer blocks")
    heads: int | None = _option(None, "attention heads", models=("gpt",))
    dropout: float | None = _option(None, "dropout probability", models=("gpt", "mlp"))
    tied: bool | None = _option(None, "share the embedding with the output layer", models=("gpt",))
    patch: int | None = _option(None, "pixels along a side of a patch", models=("patchnet",))
    norm: str | None = _option(None, "group or batch norm", models=("convnet",), choices=("group", "batch"))
    optimizer: str = _option("adamw", "the update rule", choices=OPTIMIZERS)
    lr: float | None = _option(None, "peak learning rate")
    warmup: int | None = _option(None, "steps of linear warm-up; a cosine to a tenth of the peak follows")
    weight_decay: float = _option(0.0, "weight decay, on weights of two or more axes only")
    momentum: float = _option(0.0, "momentum of SGD")
    clip: float = _option(1.0, "largest global gradient norm; 0 turns clipping off")
    accumulate: int = _option(1, "microbatches a step, one after the other")
    dtype: str | None = _option("float32", "precision of parameters and arithmetic", choices=FLOAT_DTYPES[1:])
    amp: str = _option("off", "compute in this precision where that is safe", choices=AMP_MODES)
    loss_scale: float | None = _option(
        None, "with --amp fp16: a fixed loss scale [default: adapted, from 65536]"
    )
    precision_policy: str | None = _option(
        None, "with --amp fp16: thresholds (.toml, .json) by which parameters stay in float32"
    )
    device: str = _option("auto", "where arrays live", choices=("auto", "cpu", "cuda"))
    seed: int = _option(0, "seed of initialisation, shuffling and dropout")
    dp: int | None = _option(None, "data-parallel ranks; default: all that the other axes leave")
    tp: int = _option(1, "tensor-parallel ranks: layers are cut over them")
    pp: int = _option(1, "pipeline stages: blocks are spread over them")
    schedule: str | None = _option(
        None,
        f"with --pp: the order of work, {', '.join(SCHEDULES)}, or a CSV file of your own, a line a stage such"
        f" as 0F0,0F1,0B0,0B1 (minipar schedule NAME --csv FILE writes one) [default: {DEFAULT_SCHEDULE}]",
    )
    microbatches: int | None = _option(
        None, "with --pp: pieces of the batch [default: twice the stages, or what the CSV file says]"
    )
    chunks: int | None = _option(None, "with --pp and interleaved: virtual stages a rank [default: 2]")
    tiles: str | None = _option(
        None,
        "with --pp: cut images into rows x columns of tiles, such as 2x2, which are the microbatches; for"
        " models that treat every patch alone",
        models=("mlp", "convnet", "patchnet"),
    )
    recompute: bool = _option(False, "keep blocks' inputs only; run their forward again in backward")
    sequence_parallel: bool = _option(
        False, "with --tp: also cut activations along the sequence", models=("gpt",)
    )
    convolution: str | None = _option(
        None,
        "with --tp: how a convolution is cut",
        models=("convnet", "patchnet"),
        choices=("output", "input", "region"),
    )
    zero: int = _option(0, "ZeRO stage over the data-parallel ranks: 0, 1, 2 or 3")
    partition: str | None = _option(None, "lay parameters over ranks by a policy", choices=POLICIES)
    devices: str | None = _option(None, "for --partition devices: ranks by type, such as 2xA,1xB")
    speeds: str | None = _option(
        None, "for --devices: relative speed by type, such as A=1,B=0.5 [default, with --memory: all alike]"
    )
    memory: str | None = _option(None, "for --devices: bytes by type, such as A=64MiB,B=32MiB")
    aggregation: str = _option(
        "all_reduce",
        "how ranks combine: sum gradients on all, on a master, or average parameters (local)",
        choices=ALL_AGGREGATIONS,
    )
    average_every: int | None = _option(None, "steps between parameter averages; for --aggregation local")
    bucket_mb: float | None = _option(None, f"largest gradient bucket in MiB; default: {BUCKET_MB:g}")
    overlap: bool | None = _option(None, "send gradients during backward; default: yes where possible")

    def resolved(self, defaults: dict[str, dict[str, Any]] | None = None) -> Self:
        """Return the settings with the model's defaults filled in (`DEFAULTS`, or a table like it).

        Raises:
            UsageError: an unknown model or choice, a setting the model has not, or a value out of range.
        """
        if self.model not in MODELS:
            raise UsageError(f"model {self.model!r} is unknown: use one of {', '.join(MODELS)}")
        table = (DEFAULTS if defaults is None else defaults)[self.model]
        filled: dict[str, Any] = {}
        for f in fields(self):
            value, models, choices = (
                getattr(self, f.name),
                f.metadata.get("models", MODELS),
                f.metadata.get("choices"),
            )
            option = "--" + f.name.replace("_", "-")
            if self.model not in models:
                if value is not None and value is not False:
                    raise UsageError(
                        f"{option} has no meaning for {self.model}; it is for {' and '.join(models)}"
                    )
                continue
            if choices and value is not None and value not in choices:
                raise UsageError(f"{option} {value!r} is unknown: use one of {', '.join(choices)}")
            if value is None and f.name == "dtype" and self.amp != "off":
                filled["dtype"] = "float32"  # the master weights'
            elif value is None and f.name in table:
                filled[f.name] = table[f.name]
        config = replace(self, **filled)
        config._check()
        return config

    def _check(self) -> None:
        """Refuse values out of range and combinations that cannot be."""
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} is {value}, it must be a finite number")
        for name in (
            "steps",
            "batch",
            "seq_len",
            "vocab",
            "width",
            "layers",
            "heads",
            "accumulate",
            "average_every",
            "patch",
            "microbatches",
            "chunks",
            "dp",
            "tp",
            "pp",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
        for name in ("warmup", "weight_decay", "momentum", "clip", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"--{name.replace('_', '-')} is {value}, it must not be negative")
        if self.lr is not None and self.lr <= 0:
            raise UsageError(f"--lr is {self.lr}, it must be positive")
        if self.bucket_mb is not None and self.bucket_mb <= 0:
            raise UsageError(f"--bucket-mb is {self.bucket_mb}, it must be positive")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout is {self.dropout}, it must lie in [0, 1)")
        if self.momentum and self.optimizer != "sgd":
            raise UsageError(f"--momentum is for --optimizer sgd; {self.optimizer} has its own moments")
        if self.zero not in (0, 1, 2, 3):
            raise UsageError(f"--zero is {self.zero}, stages are 1, 2 and 3, and 0 is off")
        if self.tiles is not None:
            parse_tiles(self.tiles)
        self._check_precision()
        if self.partition in STAGED_POLICIES and self.pp == 1 and self.dp not in (None, 1):
            raise UsageError(
                f"--dp {self.dp} with --partition {self.partition}: its stages take all ranks, and no ranks share"
                " the batch; leave --dp out, or use the policy in a pipeline, with --pp"
            )
        if self.devices is not None and self.partition != "devices":
            raise UsageError("--devices is for --partition devices")
        if self.devices is None and (self.speeds is not None or self.memory is not None):
            raise UsageError("--speeds and --memory describe the types in --devices")
        if self.partition in STAGED_POLICIES and self.pp == 1 and self.accumulate > 1:
            raise UsageError(
                f"--partition {self.partition} sends the batch whole from stage to stage: leave --accumulate out"
            )
        if self.norm == "batch" and self.accumulate > 1:
            raise UsageError(
                "--norm batch mixes the samples of a batch: --accumulate would change its result; use group"
            )
        if self.norm == "batch" and self.pp > 1:
            raise UsageError(
                "--norm batch mixes the samples of a batch, so the microbatches of --pp would change its result;"
                " use group"
            )
        if self.norm == "batch" and self.aggregation == "local":
            raise UsageError(
                "--norm batch needs every rank at every step, --aggregation local has none; use --norm group"
            )

    def _check_precision(self) -> None:
        """Refuse settings of mixed precision that mean nothing, or cannot be."""
        if self.amp != "off" and self.dtype != "float32":
            raise UsageError(
                f"--amp {self.amp} keeps float32 master weights: give --dtype float32, not {self.dtype}"
            )
        for name in ("loss_scale", "precision_policy"):
            if getattr(self, name) is not None and self.amp != "fp16":
                raise UsageError(f"--{name.replace('_', '-')} is about float16's range; it is for --amp fp16")
        if self.loss_scale is not None and self.loss_scale <= 0:
            raise UsageError(f"--loss-scale is {self.loss_scale}, it must be positive")
        if self.amp == "bf16" and self.device == "cuda":
            raise UsageError("--amp bf16 is for --device cpu: CuPy has no bfloat16; use --amp fp16")
        if self.precision_policy is not None and self.convolution == "region":
            raise UsageError(
                "--precision-policy decides by parameter name, which --convolution region's summed copies do"
                " not carry; use output or input"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON."""
        return asdict(self)


DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": dict(data="digits", steps=300, batch=64, width=128, layers=3, dropout=0.0, lr=3e-3, warmup=20),
    "convnet": dict(data="digits", steps=150, batch=64, width=16, layers=3, norm="group", lr=3e-3, warmup=20),
    "gpt": dict(
        data="docs", steps=600, batch=32, seq_len=64, width=128, layers=4, heads=4, dropout=0.0, tied=True,
        lr=2e-3, warmup=50,
    ),
    "patchnet": dict(data="digits", steps=300, batch=64, width=64, layers=3, patch=4, lr=3e-3, warmup=20),
}  # fmt: skip

# A proof needs little work: every layer of a kind once or twice, and a batch that 3 or 4 ranks do not divide.
VERIFY_DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": dict(
        data="digits", steps=10, batch=10, width=32, layers=3, dropout=0.0, lr=0.1, warmup=2, dtype="float64",
    ),
    "convnet": dict(
        data="digits", steps=10, batch=10, width=8, layers=2, norm="group", lr=0.1, warmup=2, dtype="float64",
    ),
    "gpt": dict(
        data="docs", steps=10, batch=10, seq_len=16, width=32, layers=2, heads=4, dropout=0.0, tied=True,
        lr=0.1, warmup=2, dtype="float64",
    ),
    "patchnet": dict(
        data="digits", steps=10, batch=10, width=8, layers=2, patch=2, lr=0.1, warmup=2, dtype="float64",
    ),
}  # fmt: skip
