"""Images cut into tiles (sub-images), so that a pipeline's microbatches can be parts of images.

    check_tiles(model, (2, 2))                  # UsageError if the model would not compute the same on tiles
    pieces = tiles(batch, 2, 2)                 # 4 microbatches, each a quarter of every image

One image may be too large to be one microbatch. Cutting it is exact where every output position depends on
the pixels of its own tile alone and has a target of its own: the loss is a sum over positions, so the pieces'
sums and gradients simply add up (`models/patchnet.py` is such a model). A 3 × 3 convolution would need its
neighbours' pixels (a halo, as tensor parallelism by image region exchanges it), a norm or a pooling over the
image needs all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from minipar import nn
from minipar.data.batch import Batch
from minipar.data.dataset import Array, Data, Dataset
from minipar.errors import UsageError
from minipar.tape import no_grad
from minipar.tensor import Tensor

PER_POSITION = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.CrossEntropyLoss)


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
    inputs = _cut(batch.inputs, rows, columns)
    targets = _cut(batch.targets[:, None], rows, columns)
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
        return inputs, np.tile(labels[:, None, None], (1, *self.positions))


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


def _window(shape: tuple[int, ...], row: int, rows: int, column: int, columns: int) -> tuple[slice, slice]:
    height, width = shape[0] // rows, shape[1] // columns
    return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)


def why_not_tiles(model: Any) -> str | None:
    """Return why the model would not compute the same on tiles, naming the module; None if it would.

    What is known to treat positions alone are convolutions of 1 × 1 and of patches (stride = kernel, no
    padding; tiles must then be whole patches) and elementwise modules. A module with parameters of its own
    that is not among them is refused, and so is everything that is known to mix.
    """
    for name, module in model.named_modules():
        reason = _why_it_mixes(module)
        if reason is not None:
            return f"{name} {reason}"
    return None


def check_tiles(model: Any, grid: tuple[int, int]) -> None:
    """Refuse a model that would not compute the same on tiles: by its modules, then by trying it.

    The trial finds what modules do not show, such as a mean over the image in a block's forward: a small
    random image runs through each block whole and in tiles, and the sums over all positions must agree.

    Raises:
        UsageError: names the module or block, and the reason.
    """
    reason = why_not_tiles(model) or _trial(model, grid)
    if reason is not None:
        raise UsageError(
            f"tiles are refused: {reason}; cut the batch into --microbatches of whole images, or use a model"
            " that treats every patch alone (patchnet)"
        )


def _trial(model: Any, grid: tuple[int, int]) -> str | None:
    rows, columns = grid
    convolutions = [m for _, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        return "there is no convolution in the model, so it does not read images position by position"
    # Each convolution or pooling makes an image smaller by its kernel: then a tile of the last is 2 × 2 positions.
    kernels = [c.weight.shape[2:] for c in convolutions]
    kernels += [_pair(m.kernel) for _, m in model.named_modules() if isinstance(m, nn.MaxPool2d | nn.AvgPool2d)]
    height, width = (math.prod(kernel[axis] for kernel in kernels) for axis in (0, 1))
    channels = convolutions[0].weight.shape[1] * convolutions[0].groups
    x = np.random.default_rng(0).standard_normal((2, channels, 2 * rows * height, 2 * columns * width))
    whole: Any = Tensor(x)
    parts: list[Any] = [Tensor(piece) for piece in _cut(x, rows, columns)]
    model.assign_paths()
    for i, block in enumerate(model.blocks):
        empty = [p for p in block.parameters() if not p.is_materialized]
        for p in empty:
            p.materialize(0, p.name, "float64", "cpu")
        try:
            with no_grad():
                whole, parts = block(whole), [block(part) for part in parts]
        except (ValueError, IndexError) as error:
            return f"block {i} ({type(block).__name__}) does not run on tiles: {error}"
        finally:
            for p in empty:
                del p.data
        for power in (1, 2):
            together = float((whole.data**power).sum())
            apart = sum(float((part.data**power).sum()) for part in parts)
            if abs(together - apart) > 1e-9 * float(np.abs(whole.data**power).sum()):
                return f"block {i} ({type(block).__name__}) computes something else on tiles than on whole images"
    return None


def _cut(x: Array, rows: int, columns: int) -> Iterator[Array]:
    """Yield the tiles of images (n, C, H, W), row by row."""
    for row in range(rows):
        for column in range(columns):
            yield x[:, :, *_window(x.shape[2:], row, rows, column, columns)]


def _why_it_mixes(module: Any) -> str | None:
    if isinstance(module, nn.Conv2d):
        (height, width), stride, padding = (
            module.weight.shape[2:],
            _pair(module.stride),
            _pair(module.padding),
        )
        if padding == (0, 0) and stride == (height, width) and _pair(module.dilation) == (1, 1):
            return None
        return f"reads {height} × {width} pixels, some of them in another tile"
    if isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
        return "normalises over all positions of the image"
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        if _pair(module.padding) == (0, 0) and _pair(module.stride or module.kernel) == _pair(module.kernel):
            return None
        return "pools over windows that reach into another tile"
    if isinstance(module, nn.GlobalAvgPool2d):
        return "pools over the whole image, and the loss is not linear in that"
    if isinstance(module, nn.Flatten | nn.Linear):
        return "takes all positions of the image together"
    if isinstance(module, nn.Dropout):
        return "draws its mask by the position in the whole image" if module.p else None
    if isinstance(module, PER_POSITION):
        return None
    own = [value for value in vars(module).values() if isinstance(value, nn.Parameter)]
    return f"({type(module).__name__}) is not known to treat every position alone" if own else None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
