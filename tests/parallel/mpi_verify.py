"""Verify several configurations in one MPI job: `mpirun -n N python mpi_verify.py FILE`.

Rank 0 writes {configuration: what was found} to FILE as JSON. The batch of 10 is not divided by 3 or 4. Two and
three ranks run `CONFIGURATIONS`, three and four the layouts of `layout_cases`, three are refused what cannot be.
"""

import json
import sys
from pathlib import Path

from minipar import world
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.training import load_data
from minipar.verification import verify
from tests.parallel.layout_cases import CASES, data_of, outcome, run
from tests.parallel.refusals import all_refusals

GPT = {"model": "gpt", "width": 16, "layers": 1, "seq_len": 8}
CONFIGURATIONS = {
    "mlp": {"model": "mlp", "dropout": 0.1},
    "mlp, master": {"model": "mlp", "aggregation": "master", "momentum": 0.9},
    "mlp, local": {"model": "mlp", "aggregation": "local", "clip": 0.0},
    "mlp, 3 samples": {"model": "mlp", "batch": 3},
    "convnet": {"model": "convnet"},
    "convnet, batch norm": {"model": "convnet", "norm": "batch", "bucket_mb": 0.002},
    "gpt": {**GPT, "bucket_mb": 0.02},
    "gpt, untied, dropout, microbatches": {**GPT, "tied": False, "dropout": 0.1, "accumulate": 2},
    "gpt, master": {**GPT, "aggregation": "master", "steps": 3},
    "gpt, no overlap, one parameter a bucket": {
        **GPT,
        "overlap": False,
        "bucket_mb": 1e-9,
        "steps": 3,
    },
}


def main(file: Path) -> None:
    comm, found, data = world(), {}, {}
    for name, settings in CONFIGURATIONS.items() if comm.size < 4 else ():
        config = TrainConfig(**{"optimizer": "sgd", "dtype": "float64", "device": "cpu", **settings})
        config = config.resolved(VERIFY_DEFAULTS)
        source = (config.data, config.seq_len)
        if source not in data:
            data[source] = load_data(config)
        found[name] = outcome(verify(config, comm, data[source]), comm)
    for name, case in CASES.get(comm.size, {}).items():
        found[name] = run(case, comm, data_of(case.config))
    if comm.size == 3:
        found["refusals"] = {"ranks": 3, "told": comm.all_gather_object(all_refusals(comm))}
    if comm.rank == 0:
        file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
