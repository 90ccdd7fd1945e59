"""Mixed precision on 4 ranks of an MPI job: `mpirun -n 4 python -m tests.amp.mpi_amp DIR`.

Each layout is verified against serial fp16, and then has a gradient overflow on one rank. A run that has overflowed
is saved by 4 ranks and, by two of them, loaded, saved again and gone on with. Rank 0 writes DIR/found.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from minipar import world
from minipar.comm.interface import Communicator
from minipar.config import VERIFY_DEFAULTS, TrainConfig
from minipar.resume import resume, save_job
from minipar.training import Job
from minipar.verification import verify
from tests.checkpoint.jobs import data, job, overflow_once, steps

STEPS = 10
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp 2 dp 2": {"tp": 2, "dp": 2},
    "pp 2 dp 2": {"pp": 2, "dp": 2},
    "zero 1": {"zero": 1},
    "zero 3": {"zero": 3},
}
SMALL = {"width": 16, "seq_len": 8}
BEFORE, AFTER = 3, 2  # steps until the checkpoint, and after it


def verified(comm: Communicator, layout: dict[str, Any], amp: str = "fp16", steps: int = STEPS) -> dict[str, Any]:
    config = TrainConfig(
        model="gpt", optimizer="sgd", amp=amp, dtype=None, device="cpu", steps=steps, **SMALL, **layout
    ).resolved(VERIFY_DEFAULTS)
    report = verify(config, comm, data("gpt"))
    Job(config, comm, data("gpt")).evaluate()  # which compares ranks' best logits
    return {
        "holds": report.holds,
        "tolerance": report.tolerance,
        "errors": {kind: worst.error for kind, worst in report.worst.items()},
        "compared": {kind: worst.compared for kind, worst in report.worst.items()},
    }


def state_of(made: Job) -> dict[str, bytes]:
    """Everything that a skipped step must not change, as this rank holds it."""
    state = {f"weight {name}": a.tobytes() for name, a in made.strategy.held("data").items()}
    for i, entry in made.optimizer.state.items():
        state |= {f"{k} of {i}": np.asarray(v).tobytes() for k, v in entry.items()}
    return state


def skipped(comm: Communicator, layout: dict[str, Any]) -> list[list[Any]]:
    """Return for each rank whether the overflowing step, and the one after it, left everything as it was."""
    made, found = job(comm, "gpt", amp="fp16", **layout), []
    overflow_once(made)
    for batch in made.loader.steps(2):
        before = state_of(made)
        made.forward_backward(batch)
        made.update(batch)
        found.append(before == state_of(made))
    return comm.all_gather_object([*found, made.precision.scaler.get_scale(), made.precision.skipped])


def resharded(comm: Communicator, place: Path) -> dict[str, list[float]]:
    """Save on 4 ranks, load on 2 and save again; return the losses that follow on either."""
    four, two = job(comm, "gpt", amp="fp16", tp=2, zero=1), comm.split(0 if comm.rank < 2 else None)
    overflow_once(four)
    steps(four, BEFORE)
    save_job(four, place / "four")
    losses = {"four": steps(four, AFTER)}
    if two is not None:
        made = job(two, "gpt", amp="fp16", pp=2)
        resume(made, place / "four")
        save_job(made, place / "two")
        losses["two"] = steps(made, AFTER)
    comm.barrier()
    return losses


def main(place: Path) -> None:
    comm = world()
    found: dict[str, Any] = {
        name: {**verified(comm, layout), "skipped": skipped(comm, layout)} for name, layout in LAYOUTS.items()
    }
    found["bf16"] = verified(comm, {"tp": 2, "dp": 2, "sequence_parallel": True}, "bf16", steps=3)
    found["resharded"] = resharded(comm, place)
    if comm.rank == 0:
        (place / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
