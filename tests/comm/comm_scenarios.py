"""What every communicator must do, written once and run on both engines.

Each scenario is a function of a communicator that asserts; a MismatchError that it provokes is caught on
every rank, so the communicator works on afterwards. `test_comm_threads.py` runs them on threads,
`mpi_scenarios.py` (started by `test_comm_mpi.py`) in one MPI job.
"""

import scenarios_collectives
import scenarios_order
import scenarios_symmetric
from scenario_helpers import SCENARIOS

__all__ = ["SCENARIOS", "scenarios_collectives", "scenarios_order", "scenarios_symmetric"]
