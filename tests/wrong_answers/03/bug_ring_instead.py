"""Passes all arrays around a ring: right sums, added in another order on each rank."""

MESSAGE = "differ in their last bits"


def doubling_all_reduce(comm, x):
    total, passing = x.copy(), x
    for _ in range(comm.size - 1):
        sending = comm.isend(passing, (comm.rank + 1) % comm.size)
        passing = comm.recv((comm.rank - 1) % comm.size)
        sending.wait()
        total = total + passing
    return total
