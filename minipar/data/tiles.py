"""Images cut into tiles (sub-images), so that a pipeline's microbatches can be parts of images.

    pieces = tiles(batch, 2, 2)                 # 4 microbatches, each a quarter of every image

One image may be too large to be one microbatch. Cutting it is exact where every output position depends on
the pixels of its own tile alone and has a target of its own: the loss is a sum over positions, so the pieces'
sums and gradients simply add up. `models/patchnet.py` is such a model; `parallel/pipeline/tile_check.py` tells
of any whether it is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from minipar.data.batch import Batch
from minipar.data.dataset import Array, Data, Dataset, targets_of
from minipar.errors import UsageError


def tiles(batch: Batch, rows: int, columns: int) -> list[Batch]:
    """Return the images' tiles from the top left, rows · columns batches; views, with the batch's own count.

    Args:
        batch: inputs (n, C, H, W); targets (n, h, w), one for each output position, where h and w may be
            smaller than H and W by a model's patch size. All tiles have one shape.

    Raises:
        UsageError: no images, targets that belong to whole images, or a size that does not divide.
    """
    if min(rows, columns) < 1:
        raise UsageError(f"tiles: {rows} × {columns} tiles are none; give at least 1 × 1")
    if batch.inputs.ndim != 4:
        raise UsageError(f"tiles: inputs of {batch.inputs.ndim} axes are not images (n, C, H, W)")
    if batch.targets.ndim != 3:
        raise UsageError(
            f"tiles: targets of {batch.targets.ndim} axes belong to whole images; tiles need one target for"
            " each output position (n, h, w)"
        )
    check_division((rows, columns), batch.inputs.shape[2:], "pixels")
    check_division((rows, columns), batch.targets.shape[1:], "targets")
    inputs = cut_images(batch.inputs, rows, columns)
    targets = cut_images(batch.targets[:, None], rows, columns)
    return [replace(batch, inputs=x, targets=t[:, 0]) for x, t in zip(inputs, targets)]


def check_division(grid: tuple[int, int], size: tuple[int, ...], what: str) -> None:
    """Raise UsageError unless rows and columns of tiles divide a height and a width."""
    for name, parts, length in zip(("rows", "columns"), grid, size):
        if length % parts:
            raise UsageError(
                f"tiles: {parts} {name} of tiles do not divide {length} {name} of {what}; all tiles need one shape"
            )


def parse_tiles(text: str) -> tuple[int, int]:
    """Return (rows, columns) of "RxC". Raises UsageError for any other text."""
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"--tiles {text}: write rows x columns, such as 2x2")
    return int(words[0]), int(words[1])


@dataclass(frozen=True)
class PatchLabels:
    """A data set of images whose label is the target of each of h × w patches: targets (n, h, w)."""

    dataset: Dataset
    positions: tuple[int, int]

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, indices: Array, dtype: npt.DTypeLike | None = None) -> tuple[Array, Array]:
        """Return images (n, C, H, W), and their labels at every position, int64."""
        inputs, labels = self.dataset.fetch(indices, dtype)
        return inputs, self._at_every_position(labels)

    def targets(self, indices: Array) -> Array:
        """The second half of `fetch`."""
        return self._at_every_position(targets_of(self.dataset, indices))

    def _at_every_position(self, labels: Array) -> Array:
        return np.tile(labels[:, None, None], (1, *self.positions))


def with_patch_labels(data: Data, patch: int, grid: tuple[int, int] = (1, 1)) -> Data:
    """Return image data whose targets are each patch's.

    Raises UsageError if patches do not divide the images, or tiles not the rows and columns of patches.
    """
    _, *size = data.info["image_shape"]
    if any(side % patch for side in size):
        raise UsageError(f"--patch {patch} does not divide images of {size[0]} × {size[1]} pixels")
    positions = size[0] // patch, size[1] // patch
    check_division(grid, positions, "patches")
    train, valid = PatchLabels(data.train, positions), PatchLabels(data.valid, positions)
    return replace(data, train=train, valid=valid)


def cut_images(x: Array, rows: int, columns: int) -> Iterator[Array]:
    """Yield the tiles of images (n, C, H, W), row by row."""
    for row in range(rows):
        for column in range(columns):
            yield x[:, :, *_window(x.shape[2:], row, rows, column, columns)]


def _window(shape: tuple[int, ...], row: int, rows: int, column: int, columns: int) -> tuple[slice, slice]:
    height, width = shape[0] // rows, shape[1] // columns
    return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
