"""One rank's part of a global batch, and how a batch is cut: among ranks, then into microbatches.

The loss of a step is the mean over all valid targets of the *global* batch. So a batch carries that
count with it, through every cut: each piece's loss is its sum over `count`, and pieces simply add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from minipar.data.dataset import Array, whole_number


def share(length: int, part: int, parts: int) -> slice:
    """Part `part` of `length` things cut into `parts` contiguous ones; the first length % parts get one more.

    >>> [share(7, part, 3) for part in range(3)]
    [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """
    size, extra = divmod(length, parts)
    start = part * size + min(part, extra)
    return slice(start, start + size + (part < extra))


def count_valid(targets: Array, ignore_index: int) -> int:
    """The number of elements of `targets` that are not `ignore_index`."""
    return int(np.count_nonzero(targets != ignore_index))


@dataclass(frozen=True, eq=False)
class Batch:
    """A contiguous slice, possibly empty, of one global batch.

        global batch   | 0 1 2 | 3 4 | 5 6 |     samples = 7
        rank 1 of 3              ^^^             offset = 3, local_samples = 2

    Unpacks as a pair: `inputs, targets = batch`.
    """

    inputs: Array       # (n, ...): this piece's samples
    targets: Array      # (n, ...): int64
    indices: Array      # (n,) int64: which samples of the data set they are
    offset: int         # place of the first one in the global batch
    samples: int        # samples of the GLOBAL batch
    count: int          # valid targets of the GLOBAL batch: what a sum of losses is divided by
    step: int = 0       # batches before this one since the start of training
    epoch: int = 0
    index: int = 0      # place of the batch in its epoch
    ignore_index: int = -100  # the target that does not count

    def __iter__(self) -> Iterator[Array]:
        yield self.inputs
        yield self.targets

    @property
    def local_samples(self) -> int:
        """Samples in this piece."""
        return len(self.indices)

    @property
    def local_count(self) -> int:
        """Valid targets in this piece; over the pieces of all ranks these add up to `count`."""
        return count_valid(self.targets, self.ignore_index)

    def split(self, pieces: int) -> list[Batch]:
        """`pieces` contiguous microbatches (views), sizes differing by at most one, some empty if it must be.

        `samples` and `count` stay those of the global batch. UsageError if `pieces` is below 1.
        """
        whole_number("the number of microbatches", pieces, 1)
        cuts = [share(self.local_samples, piece, pieces) for piece in range(pieces)]
        return [replace(self, inputs=self.inputs[cut], targets=self.targets[cut], indices=self.indices[cut],
                        offset=self.offset + cut.start) for cut in cuts]
