"""Verify several configurations in one MPI job: `mpirun -n N python mpi_verify.py FILE`.

Rank 0 writes {configuration: what was found} to FILE as JSON. The batch of 10 is not divided by 3 or 4.
"""

import json
import sys
from pathlib import Path

from minipar import world
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.training import load_data
from minipar.verification import verify

CONFIGURATIONS = {
    "mlp": {"model": "mlp", "dropout": 0.1},
    "mlp, master": {"model": "mlp", "aggregation": "master", "momentum": 0.9},
    "mlp, local": {"model": "mlp", "aggregation": "local", "clip": 0.0},
    "mlp, 3 samples": {"model": "mlp", "batch": 3},
    "convnet": {"model": "convnet"},
    "convnet, batch norm": {"model": "convnet", "norm": "batch", "bucket_mb": 0.002},
    "gpt": {"model": "gpt", "bucket_mb": 0.02},
    "gpt, untied, dropout, microbatches": {"model": "gpt", "tied": False, "dropout": 0.1, "accumulate": 2},
    "gpt, master": {"model": "gpt", "aggregation": "master", "steps": 3},
    "gpt, no overlap, one parameter a bucket": {
        "model": "gpt",
        "overlap": False,
        "bucket_mb": 1e-9,
        "steps": 3,
    },
}


def main(file: Path) -> None:
    comm, found, data = world(), {}, {}
    for name, settings in CONFIGURATIONS.items():
        config = TrainConfig(**{"optimizer": "sgd", "dtype": "float64", "device": "cpu", **settings})
        config = config.resolved(VERIFY_DEFAULTS)
        source = (config.data, config.seq_len)
        if source not in data:
            data[source] = load_data(config)
        report = verify(config, comm, data[source])
        found[name] = {
            "ranks": comm.size,
            "holds": report.holds,
            "replicas_differ": report.replicas_differ,
            "errors": {kind: worst.error for kind, worst in report.worst.items()},
            "compared": {kind: worst.compared for kind, worst in report.worst.items()},
        }
    if comm.rank == 0:
        file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
