"""Whether a model computes the same on tiles of images as on whole ones; if not, what mixes their positions.

    check_tiles(model, (2, 2))      # UsageError: "stem.conv reads 3 × 3 pixels, some of them in another tile"

Judged by the modules, then by trying. A 3 × 3 convolution would need its neighbours' pixels (a halo, as tensor
parallelism by image region exchanges it), a norm or a pooling over the image needs all of it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minipar import nn
from minipar.data.tiles import cut_images
from minipar.errors import UsageError
from minipar.tape import no_grad
from minipar.tensor import Tensor

PER_POSITION = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.CrossEntropyLoss)


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
    parts: list[Any] = [Tensor(piece) for piece in cut_images(x, rows, columns)]
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
