"""Batches in a seeded order, the same global batch for any number of ranks, made ahead, resumable.

    loader = Loader(data.train, batch=32, rank=world.rank, ranks=world.size, seed=1)
    for batch in loader.steps(1000):
        ...                                  # batch.inputs, batch.targets: this rank's slice
        saved = loader.state_dict()          # where a resumed run goes on: after this batch

The order of an epoch depends on (seed, epoch) alone. So rank r of any N holds a slice of the very batch
that a serial run has, and a position saved by one layout can be loaded by another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from minipar.data.batch import Batch, count_valid, share
from minipar.data.dataset import Array, Dataset, float_dtype, targets_of, whole_number
from minipar.data.prefetch import Prefetch
from minipar.errors import DataError, UsageError


@dataclass(frozen=True)
class SampleKeys:
    """What a transform may draw its randomness from: (seed, epoch, index) of each sample it is given.

    They do not depend on the rank or the batch, so augmentation is the same under any layout.
    """

    seed: int
    epoch: int
    indices: Array  # (n,) int64: places in the data set

    def generators(self) -> Iterator[np.random.Generator]:
        """One random generator a sample, in order. Its streams are apart from those of the shuffle."""
        for index in self.indices:
            yield np.random.default_rng([self.seed, self.epoch, int(index), 1])


Transform = Callable[[Array, Array, SampleKeys], tuple[Array, Array]]


class Loader:
    """Batches of `dataset`, `batch` samples each over all ranks; iterating gives one epoch.

    - `rank`, `ranks`: a global batch is cut contiguously among ranks, the first n % ranks get one sample
      more. A rank may get none.
    - `shuffle`: each epoch has its own order, from (seed, epoch); otherwise the data set's own order.
    - `drop_last`: leave out a last batch of fewer than `batch` samples; it is kept otherwise, and its
      `samples` and `count` tell its real size.
    - `prefetch`: batches made ahead in a background thread; 0 makes each when it is asked for.
    - `ignore_index`: the target that `Batch.count` leaves out.
    - `dtype`: that of floating inputs (None: float32).
    - `transform(inputs, targets, keys)`: applied to this rank's slice where batches are made. It keeps the
      number of samples and of valid targets, and draws at random only from `keys` (`SampleKeys`).

    Iterating goes on from the current position, which is just after the last batch handed out (batches
    made ahead do not count). One iteration at a time: starting another ends the one before.
    UsageError for an empty data set and for arguments out of range.
    """

    def __init__(self, dataset: Dataset, batch: int, *, rank: int = 0, ranks: int = 1, seed: int = 0,
                 shuffle: bool = True, drop_last: bool = False, prefetch: int = 2, ignore_index: int = -100,
                 dtype: npt.DTypeLike | None = None, transform: Transform | None = None) -> None:
        self.dataset = dataset
        self.batch = whole_number("batch", batch, 1)
        self.ranks = whole_number("ranks", ranks, 1)
        self.rank = whole_number("rank", rank, 0)
        self.seed = whole_number("seed", seed, 0)
        self.prefetch = whole_number("prefetch", prefetch, 0)
        self.shuffle, self.drop_last, self.ignore_index = bool(shuffle), bool(drop_last), int(ignore_index)
        self.dtype = float_dtype(dtype)
        self.transform = transform
        self.length = len(dataset)
        if self.rank >= self.ranks:
            raise UsageError(f"rank {rank} of {ranks} ranks: ranks are numbered from 0 to {self.ranks - 1}")
        if self.length == 0:
            raise UsageError("the data set has no samples: there is nothing to load")
        if self.drop_last and self.length < self.batch:
            raise UsageError(f"batch {batch} is more than the {self.length} samples, and drop_last leaves "
                             "out what does not fill a batch: use a smaller batch or drop_last=False")
        self._epoch = self._index = 0  # the next batch to hand out
        self._source: Iterator[Batch] | None = None  # of the iteration under way

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.length // self.batch if self.drop_last else -(-self.length // self.batch)

    def samples_of(self, steps: int) -> int:
        """Samples in the first `steps` batches, from the start of the first epoch on."""
        epochs, rest = divmod(steps, len(self))
        in_an_epoch = len(self) * self.batch if self.drop_last else self.length
        return epochs * in_an_epoch + rest * self.batch

    # --- iterating ---------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """What is left of the current epoch: all of it at the start."""
        return self._hand_out(lambda: len(self) - self._index)

    def steps(self, number: int) -> Iterator[Batch]:
        """The next `number` batches, over as many epochs as that takes."""
        whole_number("the number of steps", number, 0)
        return self._hand_out(lambda: number)

    def forever(self) -> Iterator[Batch]:
        """Batches without end, epoch after epoch."""
        return self._hand_out(lambda: None)

    def _hand_out(self, limit: Callable[[], int | None]) -> Iterator[Batch]:
        """The generator behind all three. It starts, and asks for `limit`, at its first `next`."""
        self.close()
        made = islice(self._make(self._epoch, self._index), limit())
        source = Prefetch(made, self.prefetch) if self.prefetch else made
        self._source = source
        try:
            for batch in source:
                self._epoch, self._index = divmod(batch.step + 1, len(self))
                yield batch
                if self._source is not source:
                    break
            if self._source is not source:
                raise UsageError("this iteration of the loader was ended by close, rewind, load_state_dict "
                                 "or another iteration: it cannot go on; use two loaders for two streams")
        finally:
            if isinstance(source, Prefetch):
                source.close()
            if self._source is source:
                self._source = None

    # --- making batches (in the background thread) ---------------------------------------------------

    def _make(self, epoch: int, first: int) -> Iterator[Batch]:
        while True:
            order = self.order(epoch)
            for index in range(first, len(self)):
                yield self._batch(order, epoch, index)
            epoch, first = epoch + 1, 0

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The data set's indices in the order of `epoch`, int64 (length,); the same on every rank."""
        if not self.shuffle:
            return np.arange(self.length)
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def _batch(self, order: Array, epoch: int, index: int) -> Batch:
        members = order[index * self.batch:(index + 1) * self.batch]  # the global batch
        mine = share(len(members), self.rank, self.ranks)
        indices = members[mine]
        inputs, targets = self.dataset.fetch(indices, self.dtype)
        local = count_valid(targets, self.ignore_index)
        total = local if self.ranks == 1 else self._count(members)
        if self.transform is not None:
            inputs, targets = self.transform(inputs, targets, SampleKeys(self.seed, epoch, indices))
            found = len(inputs), len(targets), count_valid(targets, self.ignore_index)
            if found != (len(indices), len(indices), local):
                # Other ranks have counted this rank's targets already, without its transform.
                raise UsageError(f"the transform made {found[0]} inputs, {found[1]} targets and {found[2]} "
                                 f"valid target elements of {len(indices)}, {len(indices)} and {local}: it "
                                 "must keep these numbers")
        return Batch(inputs, targets, indices, offset=mine.start, samples=len(members), count=total,
                     step=epoch * len(self) + index, epoch=epoch, index=index, ignore_index=self.ignore_index)

    def _count(self, members: Array) -> int:
        """Valid targets of the global batch: every rank looks at all of them, so none has to ask another."""
        return count_valid(targets_of(self.dataset, members, self.dtype), self.ignore_index)

    # --- position ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, and what it is a position in; plain values."""
        return {"epoch": self._epoch, "index": self._index, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        return {"length": self.length, "batch": self.batch, "seed": self.seed, "shuffle": self.shuffle,
                "drop_last": self.drop_last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which any rank of any number of ranks has saved.

        UsageError if it is of another data set length, batch, seed, shuffle or drop_last; DataError if it
        is not a loader's state.
        """
        identity = self._identity()
        missing = [key for key in ("epoch", "index", *identity) if key not in state]
        if missing:
            raise DataError(f"the saved data position lacks {', '.join(missing)}")
        differing = [f"{key} {state[key]!r} (now {value!r})"
                     for key, value in identity.items() if state[key] != value]
        if differing:
            raise UsageError(f"the saved data position is of {', '.join(differing)}: the order of samples "
                             "would not go on from there; use the same settings, or start anew")
        epoch, index = state["epoch"], state["index"]
        if not (isinstance(epoch, int) and isinstance(index, int) and epoch >= 0 and 0 <= index < len(self)):
            raise DataError(f"the saved data position is epoch {epoch!r}, batch {index!r}: expected an epoch "
                            f"of at least 0 and a batch from 0 to {len(self) - 1}")
        self.close()
        self._epoch, self._index = epoch, index

    def rewind(self, epoch: int = 0) -> None:
        """Go to the start of `epoch`; ends an iteration under way."""
        epoch = whole_number("epoch", epoch, 0)
        self.close()
        self._epoch, self._index = epoch, 0

    # --- closing -------------------------------------------------------------------------------------

    def close(self) -> None:
        """End an iteration under way and its thread. The position stays; iterating again goes on from it."""
        source, self._source = self._source, None
        if isinstance(source, Prefetch):
            source.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
