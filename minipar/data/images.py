"""Images as data: normalise them once, fetch them in batches; digits, IDX and CIFAR-10 loaded.

Pixels stay in memory as they came (one byte each) and become floats when a batch is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minipar.data import cifar
from minipar.data.dataset import Array, Data, float_dtype, whole_number
from minipar.data.idx import read_idx
from minipar.errors import DataError, UsageError

_CHUNK = 4096  # images turned to float64 at a time while measuring: 25 MB for MNIST


@dataclass(frozen=True)
class Normalisation:
    """x → (x · scale − mean) / std, with one mean and one std a channel.

    `scale` brings raw pixels to [0, 1] (1/255 for bytes).
    """

    scale: float
    mean: tuple[float, ...]  # (C,)
    std: tuple[float, ...]   # (C,)

    @classmethod
    def of(cls, images: Array, scale: float) -> Normalisation:
        """That of `images` (N, C, H, W): the result has mean 0 and variance 1 in every channel.

        A channel of one constant has no variance: its std is taken as 1, and it becomes all zero.
        """
        samples, channels, height, width = images.shape
        pixels = samples * height * width
        total = np.zeros(channels)
        for start in range(0, samples, _CHUNK):
            total += images[start:start + _CHUNK].sum(axis=(0, 2, 3), dtype=np.float64)
        mean = total / pixels
        squares = np.zeros(channels)
        for start in range(0, samples, _CHUNK):
            centred = images[start:start + _CHUNK] - mean[:, None, None]  # float64 (n, C, H, W)
            squares += np.square(centred, out=centred).sum(axis=(0, 2, 3))
        std = np.sqrt(squares / pixels) * scale
        std[std == 0] = 1.0
        return cls(float(scale), tuple((mean * scale).tolist()), tuple(std.tolist()))

    def __call__(self, images: Array, dtype: npt.DTypeLike | None) -> Array:
        """`images` (N, C, H, W) normalised, as `dtype`. Computed in float64 and rounded once."""
        made = images.astype(np.float64)
        made *= self.scale
        made -= np.array(self.mean)[:, None, None]
        made /= np.array(self.std)[:, None, None]
        return made.astype(float_dtype(dtype), copy=False)


class ImageDataset:
    """Images with one label each: inputs (N, C, H, W) floating, targets (N,) int64 in 0 … classes − 1.

    `images` is uint8 or floating of shape (N, C, H, W), `labels` integer (N,); `name` says in errors
    where they came from. DataError for no images, unequal counts, NaN or infinity, labels out of range.
    """

    def __init__(self, images: Array, labels: Array, classes: int, normalisation: Normalisation,
                 name: str = "images") -> None:
        check_images(images, name)
        check_labels(labels, len(images), classes, name)
        if len(normalisation.mean) != images.shape[1]:
            raise UsageError(f"{name}: {images.shape[1]} channels, but the normalisation is for "
                             f"{len(normalisation.mean)}")
        self.images, self.labels, self.classes = images, labels.astype(np.int64), classes
        self.normalisation = normalisation

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Array, dtype: npt.DTypeLike | None = None) -> tuple[Array, Array]:
        """Normalised images (N, C, H, W) of `dtype` (None: float32), and labels int64 (N,)."""
        return self.normalisation(self.images[indices], dtype), self.labels[indices]

    def targets(self, indices: Array) -> Array:
        """The second half of `fetch`: int64 (N,)."""
        return self.labels[indices]


def check_images(images: Array, name: str) -> None:
    """DataError unless `images` is (N, C, H, W) with every size at least 1, uint8 or finite floating."""
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"{name}: images of shape {images.shape} hold nothing to train on; "
                        "expected (N, C, H, W) with no size 0")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DataError(f"{name}: images of {images.dtype} are not supported: give uint8, float32 or float64")
    if images.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        if bad.size:
            value = images[bad[0]][~np.isfinite(images[bad[0]])][0]
            raise DataError(f"{name}: sample {bad[0]} holds {value} ({bad.size} of {len(images)} samples "
                            "hold NaN or infinity): clean or drop them")


def check_labels(labels: Array, images: int, classes: int | None, name: str) -> None:
    """DataError unless there are `images` integer labels in 0 … classes − 1 (None: any not negative)."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{name}: labels are {labels.dtype} of shape {labels.shape}, "
                        "expected integers of (N,)")
    if len(labels) != images:
        raise DataError(f"{name}: {images} images but {len(labels)} labels")
    bad = np.flatnonzero((labels < 0) if classes is None else (labels < 0) | (labels >= classes))
    if bad.size:
        allowed = "at least 0" if classes is None else f"0 to {classes - 1}"
        raise DataError(f"{name}: sample {bad[0]} has label {labels[bad[0]]}, expected {allowed}")


def _data(name: str, train: tuple[Array, Array, str], valid: tuple[Array, Array, str], classes: int,
          scale: float) -> Data:
    """Both splits, normalised by the training images; each given as (images, labels, name for errors)."""
    check_images(train[0], train[2])  # before they are measured
    if train[0].shape[1:] != valid[0].shape[1:]:
        raise DataError(f"{name}: training images are {train[0].shape[1:]}, test images {valid[0].shape[1:]} "
                        "(C, H, W): they must agree")
    normalisation = Normalisation.of(train[0], scale)
    splits = [ImageDataset(images, labels, classes, normalisation, where)
              for images, labels, where in (train, valid)]
    info = {
        "kind": "images", "name": name, "classes": classes, "image_shape": list(train[0].shape[1:]),
        "train_samples": len(train[0]), "valid_samples": len(valid[0]),
        "mean": list(normalisation.mean), "std": list(normalisation.std),
    }
    return Data(splits[0], splits[1], info)


def load_digits(seed: int) -> Data:
    """scikit-learn's handwritten digits: 1797 images (1, 8, 8) in 10 classes, 17 grey levels.

    They come unsplit: of each class, a fifth chosen by `seed` is for validation, the rest for training.
    """
    seed = whole_number("seed", seed, 0)
    from sklearn import datasets  # takes about a second: imported only when asked for

    found = datasets.load_digits()
    images, labels = found.images.astype(np.uint8)[:, None], found.target  # (1797, 1, 8, 8), (1797,)
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        chosen = np.random.default_rng([seed, digit]).permutation(members)
        held_out[chosen[:round(len(members) / 5)]] = True
    train = (images[~held_out], labels[~held_out], "digits (training)")
    valid = (images[held_out], labels[held_out], "digits (validation)")
    return _data("digits", train, valid, 10, scale=1 / 16)


def load_idx(name: str, paths: tuple[Path, Path, Path, Path]) -> Data:
    """The four files that `idx.find_idx` found; the classes are 0 up to the largest training label.

    Bytes are scaled to [0, 1] before they are normalised; floating images are normalised as they are.
    """
    images = [read_idx(path, 3)[:, None] for path in (paths[0], paths[2])]  # (N, 1, H, W)
    labels = [read_idx(path, 1) for path in (paths[1], paths[3])]           # (N,)
    if images[0].dtype != images[1].dtype:
        raise DataError(f"{paths[0]} holds {images[0].dtype}, {paths[2]} holds {images[1].dtype}: "
                        "they must agree")
    check_images(images[0], str(paths[0]))  # there is at least one
    check_labels(labels[0], len(images[0]), None, str(paths[1]))
    classes = int(labels[0].max()) + 1
    check_labels(labels[1], len(images[1]), classes, str(paths[3]))
    train = (images[0], labels[0], str(paths[0]))
    valid = (images[1], labels[1], str(paths[2]))
    return _data(name, train, valid, classes, scale=1 / 255 if images[0].dtype == np.uint8 else 1.0)


def load_cifar(name: str, train_paths: list[Path], test_path: Path) -> Data:
    """CIFAR-10 from the batches that `cifar.find_cifar` found: images (3, 32, 32) in 10 classes."""
    batches = []
    for path in (*train_paths, test_path):
        images, labels = cifar.read_batch(path)
        check_images(images, str(path))
        check_labels(labels, len(images), cifar.CLASSES, str(path))
        batches.append((images, labels))
    train_images = np.concatenate([images for images, _ in batches[:-1]])
    train_labels = np.concatenate([labels for _, labels in batches[:-1]])
    return _data(name, (train_images, train_labels, f"{name} (training)"), (*batches[-1], str(test_path)),
                 cifar.CLASSES, scale=1 / 255)
