"""Virtual time: what a parallel program would take on ranks and wires that are only declared.

Pass `clock=Clock(alpha, beta)` to `launch`, declare computation with `comm.compute(seconds)`, and read
`comm.now()`. Scaling of 64 ranks and the bubble of a pipeline then come out the same on any laptop, because
no real time enters: a message of n bytes takes alpha + beta * n, a receive ends at the later of the
receiver's own time and the message's arrival, and a collective starts when its last rank has arrived. A send ends
when its message arrives: it waits until its receive is called, and never for the receiver's time. Messages do not
slow each other: several that a rank sends at once with `isend` all travel at full speed, as over ports of their own.

Costs are those of R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of collective communication
operations in MPICH" (2005), with the time of the additions (gamma) left to `compute`. Broadcast and reduce
take the cheaper of the binomial tree and the scatter-based form, as MPI libraries do.
"""

from __future__ import annotations

from dataclasses import dataclass

from minipar.errors import UsageError


@dataclass(frozen=True)
class Clock:
    """The machine that is pretended: seconds a message (alpha) and seconds a byte (beta)."""

    alpha: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if not (self.alpha >= 0 and self.beta >= 0):
            raise UsageError(f"Clock(alpha={self.alpha}, beta={self.beta}): both must be zero or more")

    def message(self, n_bytes: float) -> float:
        """Return the seconds from the start of a send to the end of its receive: alpha + beta n."""
        return self.alpha + self.beta * n_bytes

    def collective(self, operation: str, n_bytes: float, ranks: int) -> float:
        """Return the seconds of a collective on `n_bytes` in all (the ledger's meaning) over `ranks`.

        all_reduce (ring)                   2 (N-1) alpha + 2 (N-1)/N n beta
        reduce_scatter, all_gather (ring)     (N-1) alpha +   (N-1)/N n beta
        all_to_all (pairwise)                 (N-1) alpha +   (N-1)/N n beta
        broadcast, reduce    min of the tree  ceil(lg N) (alpha + n beta)
                             and of     (ceil(lg N) + N-1) alpha + 2 (N-1)/N n beta
        gather, scatter, on n bytes a rank    ceil(lg N) alpha + (N-1) n beta
        barrier, split, symmetric, objects    ceil(lg N) alpha
        """
        if ranks == 1:
            return 0.0
        steps, rounds, wire = ranks - 1, (ranks - 1).bit_length(), self.beta * n_bytes
        share = wire * steps / ranks
        if operation == "all_reduce":
            return 2 * steps * self.alpha + 2 * share
        if operation in ("reduce_scatter", "all_gather", "all_to_all"):
            return steps * self.alpha + share
        if operation in ("broadcast", "reduce"):
            tree = rounds * (self.alpha + wire)
            return min(tree, (rounds + steps) * self.alpha + 2 * share)
        if operation in ("gather", "scatter"):
            return rounds * self.alpha + steps * wire
        return rounds * self.alpha
