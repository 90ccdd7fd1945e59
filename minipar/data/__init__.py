"""Data sets and loaders: real text and images, by name or by path, as batches that ranks share.

    data = load("docs", seq_len=64)          # or "digits", a text file, an IDX or CIFAR-10 folder
    loader = Loader(data.train, batch=32, rank=world.rank, ranks=world.size)
    for batch in loader.steps(100): ...

Everything here is NumPy on the host. Within the package each file imports only from those before it:
vocabulary, dataset, text, idx, cifar, images, batch, prefetch, loader, tiles.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from minipar.data.batch import Batch, share
from minipar.data.cifar import find_cifar
from minipar.data.dataset import Data, Dataset
from minipar.data.idx import LAYOUT, TYPES, find_idx
from minipar.data.images import ImageDataset, Normalisation, load_cifar, load_digits, load_idx
from minipar.data.loader import Loader, SampleKeys, Transform
from minipar.data.text import WindowDataset, docs_text, load_text, read_text
from minipar.data.vocabulary import Vocabulary
from minipar.errors import UsageError

__all__ = [
    "Batch", "Data", "Dataset", "ImageDataset", "Loader", "Normalisation", "SampleKeys", "Transform",
    "Vocabulary", "WindowDataset", "docs_text", "load", "load_text", "read_text", "share",
]

Kind = Literal["text", "images"]
NAMES: dict[str, Kind] = {"docs": "text", "digits": "images"}


def load(source: str | os.PathLike[str], kind: Kind | None = None, seq_len: int = 64, seed: int = 0) -> Data:
    """The data at `source`, split into training and validation sets.

    `source`: "docs" (English text, no download), "digits" (scikit-learn's, 8 × 8), or a path: a UTF-8 text
    file; a folder or file prefix of four IDX files (MNIST's layout); a folder of CIFAR-10 for python. A name
    comes before a file of that name: write ./docs for the file.
    `kind`: "text" or "images" if the path alone should not decide, or to be sure.
    `seq_len`: characters in a window of text. `seed`: which digits are held out; the other sources have a
    split of their own (text: the last tenth; IDX and CIFAR-10: their test set).

    UsageError: no such name or path, or of the other kind. DataError: contents that cannot be used.
    """
    if kind not in (None, "text", "images"):
        raise UsageError(f"unknown kind of data {kind!r}: give 'text' or 'images'")
    name = os.fspath(source)
    if name in NAMES:
        if kind is not None and kind != NAMES[name]:
            raise UsageError(f"{name} is {NAMES[name]}, and {kind} is wanted: use "
                             f"{next(other for other in NAMES if NAMES[other] == kind)} or a path")
        return load_text(docs_text(), name, seq_len) if name == "docs" else load_digits(seed)
    path = Path(name).expanduser()
    if path.is_file() and (kind == "text" or (kind is None and not _looks_like_idx(path))):
        return load_text(read_text(path), name, seq_len)
    if kind == "text":
        if path.exists():
            raise UsageError(f"{name} is a folder: text is read from one file")
        raise UsageError(_unknown(name))
    return _load_images(name, path)


def _load_images(name: str, path: Path) -> Data:
    if (files := find_idx(path)) is not None:
        return load_idx(name, files)
    if path.is_dir() and (batches := find_cifar(path)) is not None:
        return load_cifar(name, *batches)
    if not path.exists():
        raise UsageError(_unknown(name))
    raise UsageError(f"{name} holds no images that are known here: expected a folder or prefix of the IDX "
                     f"files {LAYOUT}, or a folder with CIFAR-10's data_batch_1 to 5 and test_batch")


def _looks_like_idx(path: Path) -> bool:
    """By the magic, and for a gzipped or damaged file by the name."""
    if "-images-idx" in path.name or "-images.idx" in path.name:
        return True
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in TYPES and 1 <= magic[3] <= 4


def _unknown(name: str) -> str:
    return (f"unknown data {name!r}: give a name ({', '.join(NAMES)}) or an existing path (a UTF-8 text "
            "file, or a folder with IDX or CIFAR-10 files)")
