"""Train an MLP of 12.7 million parameters under a memory cap: `python zero_capped.py serial|zero MEGABYTES`.

The cap is on this process's private memory beyond what the interpreter and its libraries hold already. Rank 0
prints the losses of the AdamW steps. Training needs 193 MiB of parameters, gradients and optimizer state.
"""

import resource
import sys

import numpy as np

from minipar import Tensor, optim, world
from minipar.comm import Communicator
from minipar.data.batch import share
from minipar.models import MLP, MLPConfig
from minipar.parallel.zero.zero import Zero

STEPS = 2


def private_bytes() -> int:
    """What RLIMIT_DATA counts: heap and private writable mappings."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def losses(comm: Communicator, sharded: bool) -> list[float]:
    """The mean loss over a batch of 8 at each step, trained whole on this rank or under ZeRO stage 3."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((8, 64)).astype(np.float32), rng.integers(0, 10, 8)
    model = MLP(MLPConfig(inputs=64, classes=10, width=1024, layers=14))
    zero = Zero(model, comm, 3).materialize(0) if sharded else None
    forward = zero or model.materialize(0)
    optimizer = optim.AdamW([t for _, t in zero.shards()] if zero else model.parameters(), lr=1e-4)
    mine, found = share(len(inputs), comm.rank, comm.size), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model.loss(forward(Tensor(inputs[mine])), targets[mine]) / len(inputs)
        loss.backward()
        found.append(float(comm.all_reduce(np.array([loss.item()]))[0]))
        if zero:
            zero.step(optimizer)
        else:
            optimizer.step()
    return found


def main(kind: str, megabytes: int) -> None:
    comm = world()
    comm.barrier()  # what the library allocates at the first message does not count
    resource.setrlimit(resource.RLIMIT_DATA, (private_bytes() + megabytes * 2**20, -1))
    try:
        found = losses(comm, kind == "zero")
    except MemoryError:
        resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
        sys.exit("MemoryError")
    if comm.rank == 0:
        print(*found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
