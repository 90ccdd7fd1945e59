"""What a data set is: the two methods a loader needs, and the pair of splits that `load` returns.

Read this to write a data set of your own. Anything with a length and a `fetch` can be loaded, sharded
over ranks and resumed; see `text.WindowDataset` (25 lines) for a complete one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minipar.data.vocabulary import Vocabulary
from minipar.errors import UsageError

Array = npt.NDArray[Any]

FLOATS = ("float16", "float32", "float64")


class Dataset(Protocol):
    """A fixed number of samples, each an input and its target(s), fetched by index.

    A data set may also have `targets(indices)`, the second half of `fetch` alone: with it, a rank counts
    the targets of samples that other ranks hold without building their inputs.
    """

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def fetch(self, indices: Array, dtype: npt.DTypeLike | None = None) -> tuple[Array, Array]:
        """The samples `indices` (int64, (N,)) as new arrays: inputs (N, ...) and targets (N, ...) int64.

        `dtype` is that of floating inputs (None: float32). Token ids are int64 whatever it is.
        """
        ...


def targets_of(dataset: Dataset, indices: Array, dtype: npt.DTypeLike | None = None) -> Array:
    """The targets (N, ...) of samples, without their inputs where the data set has `targets`."""
    read = getattr(dataset, "targets", None)
    targets: Array = dataset.fetch(indices, dtype)[1] if read is None else read(indices)
    return targets


@dataclass(frozen=True)
class Data:
    """The two splits of a source, and what is known of it.

    `info` holds plain numbers, strings and lists only, so it can be written as JSON:
    `kind`, `name`, `train_samples`, `valid_samples`, and
    for text `vocabulary_size`, `characters`, `train_characters`, `valid_characters`, `seq_len`;
    for images `classes`, `image_shape` [C, H, W], and the training set's `mean` and `std` per channel.
    """

    train: Dataset
    valid: Dataset
    info: Mapping[str, Any]
    vocabulary: Vocabulary | None = None


def float_dtype(dtype: npt.DTypeLike | None) -> np.dtype[Any]:
    """`dtype` as a NumPy dtype, float32 for None. UsageError for anything but the three NumPy floats."""
    try:
        found = np.dtype(np.float32 if dtype is None else dtype)
    except TypeError as error:
        raise UsageError(f"data dtype {dtype!r} is not a dtype: give one of {', '.join(FLOATS)}") from error
    if found.name not in FLOATS:
        raise UsageError(f"data dtype {found.name}: floating inputs come as one of {', '.join(FLOATS)}")
    return found


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`; UsageError that names the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)
