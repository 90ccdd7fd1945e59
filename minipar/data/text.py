"""Text as data: read a text, and cut it into windows for a language model.

`docs_text()` is English without a download: the language reference that every CPython carries.
`load_text` splits a text into training and validation data sets of `WindowDataset`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minipar.data.dataset import Array, Data, whole_number
from minipar.data.vocabulary import Vocabulary
from minipar.errors import DataError, UsageError

# Typographic marks in the docs and what a keyboard writes for them; the few other non-ASCII letters go.
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "..."})


class WindowDataset:
    """Windows of T = `seq_len` characters, each with the characters that follow as targets.

    Sample i is `(ids[i*T : i*T + T], ids[i*T + 1 : i*T + T + 1])`. Windows lie side by side, so each
    character is a target once an epoch; what is left at the end, shorter than a window, is dropped.
    """

    def __init__(self, ids: Array, seq_len: int) -> None:
        self.seq_len = whole_number("seq_len", seq_len, 1)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UsageError(f"ids must be integers of shape (length,), not {ids.dtype} of {ids.shape}")
        if len(ids) < self.seq_len + 1:
            raise UsageError(f"a text of {len(ids)} characters holds no window of seq_len {seq_len}, which "
                             f"takes {self.seq_len + 1}: use a longer text or a smaller seq_len")
        self.ids = ids

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.seq_len

    def fetch(self, indices: Array, dtype: npt.DTypeLike | None = None) -> tuple[Array, Array]:
        """Inputs and targets, both int64 (N, T). Ids have one dtype: `dtype` speaks of floats only."""
        return self._windows(indices, 0), self._windows(indices, 1)

    def targets(self, indices: Array) -> Array:
        """The second half of `fetch`: int64 (N, T)."""
        return self._windows(indices, 1)

    def _windows(self, indices: Array, shift: int) -> Array:
        starts = np.asarray(indices, np.int64) * self.seq_len + shift                           # (N,)
        return self.ids[starts[:, None] + np.arange(self.seq_len)].astype(np.int64)             # (N, T)


def docs_text() -> str:
    """The `pydoc_data.topics` of this Python, joined in sorted order: about 465,000 ASCII characters.

    The text is part of CPython and differs a little between its versions.
    """
    from pydoc_data.topics import topics  # half a megabyte: read only when asked for

    joined = "\n".join(topics[name] for name in sorted(topics)).translate(_ASCII)
    return joined.encode("ascii", "ignore").decode("ascii")


def read_text(path: str | os.PathLike[str]) -> str:
    """The UTF-8 text in the file `path`, unchanged but for a leading byte-order mark, which is dropped.

    UsageError if there is no such file; DataError if it is empty, or not UTF-8 (names the byte).
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the text file {path}: {error.strerror}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {content[error.start]:#04x} at offset {error.start} "
                        "cannot be decoded; save the file as UTF-8") from error
    text = text.removeprefix("\ufeff")
    if not text:
        raise DataError(f"{path} is empty: training needs text")
    return text


def load_text(text: str, name: str, seq_len: int) -> Data:
    """Split `text`: the last tenth (at least one window) is for validation, the rest for training.

    The vocabulary is that of the whole text. UsageError if either part is shorter than `seq_len + 1`.
    """
    seq_len = whole_number("seq_len", seq_len, 1)
    vocabulary = Vocabulary.of(text)
    valid_length = max(len(text) // 10, seq_len + 1)
    train_length = len(text) - valid_length
    if train_length < seq_len + 1:
        raise UsageError(f"the text {name} has {len(text)} characters; training and validation windows of "
                         f"seq_len {seq_len} take at least {2 * (seq_len + 1)}: use a longer text or a "
                         "smaller seq_len")
    ids = vocabulary.encode(text).astype(np.min_scalar_type(len(vocabulary) - 1))  # one byte a character
    train = WindowDataset(ids[:train_length], seq_len)
    valid = WindowDataset(ids[train_length:], seq_len)
    info = {
        "kind": "text", "name": name, "vocabulary_size": len(vocabulary), "seq_len": seq_len,
        "characters": len(text), "train_characters": train_length, "valid_characters": valid_length,
        "train_samples": len(train), "valid_samples": len(valid),
    }
    return Data(train, valid, info, vocabulary)
