"""Images cut into tiles (sub-images), so that a pipeline's microbatches can be parts of images.

    if reason := why_not_tiles(model): ...      # "blocks.0.conv reads 3 × 3 pixels, some of them in another tile"
    pieces = tiles(batch, 2, 2)                 # 4 microbatches, each a quarter of every image

One image may be too large to be one microbatch. Cutting it is exact where every output position depends on
the pixels of its own tile alone and has a target of its own: the loss is a sum over positions, so the pieces'
sums and gradients simply add up. A 3 × 3 convolution would need its neighbours' pixels (a halo, as
tensor parallelism by image region exchanges it), a norm or a pooling over the image needs all of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minipar import nn
from minipar.data.batch import Batch
from minipar.errors import UsageError

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
    for name, size, parts in zip(
        ("height", "width") * 2, (*batch.inputs.shape[2:], *batch.targets.shape[1:]), (rows, columns) * 2
    ):
        if size % parts:
            raise UsageError(f"tiles: {parts} tiles do not divide a {name} of {size}; all need one shape")
    pieces = []
    for row in range(rows):
        for column in range(columns):
            x = batch.inputs[:, :, *_window(batch.inputs.shape[2:], row, rows, column, columns)]
            t = batch.targets[:, *_window(batch.targets.shape[1:], row, rows, column, columns)]
            pieces.append(replace(batch, inputs=x, targets=t))
    return pieces


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


def _why_it_mixes(module: Any) -> str | None:
    if isinstance(module, nn.Conv2d):
        (height, width), stride, padding = (
            module.weight.shape[2:],
            _pair(module.stride),
            _pair(module.padding),
        )
        if padding == (0, 0) and stride == (height, width):
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
