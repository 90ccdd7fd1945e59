"""Run every scenario in one MPI job: `mpirun -n N python mpi_scenarios.py DIRECTORY [apart]`.

Each rank writes what came of each scenario to DIRECTORY/rankR.json: null, or the traceback. With `apart` the ranks
find no memory that they share, as ranks of several hosts do not.
"""

import json
import sys
import traceback
from pathlib import Path

from comm_scenarios import SCENARIOS

from minipar.comm import world
from minipar.comm.shared_memory import Line, SharedMemory


def main(directory: Path) -> None:
    comm, outcome = world(), {}
    for name, scenario in SCENARIOS.items():
        comm.mark(phase=name)
        try:
            scenario(comm)
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
        failed = comm.all_gather_object(outcome[name] is not None)
        if any(failed):  # ranks may be out of step now: what follows would only confuse
            break
    (directory / f"rank{comm.rank}.json").write_text(json.dumps(outcome))


if "apart" in sys.argv:
    SharedMemory.take = lambda memory: Line(0, -1)  # type: ignore[method-assign]
main(Path(sys.argv[1]))
