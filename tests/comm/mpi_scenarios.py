"""Run every scenario in one MPI job: `mpirun -n N python mpi_scenarios.py DIRECTORY`.

Each rank writes what came of each scenario to DIRECTORY/rankR.json: null, or the traceback.
"""

import json
import sys
import traceback
from pathlib import Path

from comm_scenarios import SCENARIOS

from minipar.comm import world


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


main(Path(sys.argv[1]))
