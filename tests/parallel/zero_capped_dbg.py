"""Train an MLP of 12.7 million parameters under a memory cap: `python zero_capped.py serial|zero MEGABYTES`.

The cap is on this process's private memory beyond what the interpreter and its libraries hold already; 0 is no
cap. Prints the losses of three AdamW steps, and the largest resident size, from rank 0.
"""

import resource
import sys

import numpy as np

from minipar import Tensor, optim, world
from minipar.data.batch import share
from minipar.models import MLP, MLPConfig
from minipar.parallel.zero import Zero


def private_bytes() -> int:
    """What RLIMIT_DATA counts: heap and private writable mappings."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def main(kind: str, megabytes: int) -> None:
    comm = world()
    comm.barrier()  # what the library allocates at the first message does not count
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((8, 64)).astype(np.float32), rng.integers(0, 10, 8)
    base = private_bytes()
    model = MLP(MLPConfig(inputs=64, classes=10, width=1024, layers=14))
    if megabytes:
        limit = private_bytes() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        if kind == "serial":
            forward, tensors = model.materialize(0), list(model.parameters())
        else:
            forward = Zero(model, comm, 3).materialize(0)
            tensors = [t for _, t in forward.shards()]
        optimizer, losses = optim.AdamW(tensors, lr=1e-4), []
        mine = share(len(inputs), comm.rank, comm.size)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model.loss(forward(Tensor(inputs[mine])), targets[mine]) / len(inputs)
            loss.backward()
            print(comm.rank, 'after backward', private_bytes()/2**20 - base/2**20, flush=True)
            losses.append(float(comm.all_reduce(np.array([loss.item()]))[0]))
            if kind == "serial":
                optimizer.step()
            else:
                forward.step(optimizer)
    except MemoryError:
        import traceback; traceback.print_exc(); print(private_bytes()/2**20, limit/2**20)
        print("MemoryError", flush=True)
        sys.exit(3)
    if comm.rank == 0:
        print(*losses, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


main(sys.argv[1], int(sys.argv[2]))
