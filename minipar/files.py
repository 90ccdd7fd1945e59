"""Files that come to be whole or not at all: written under a temporary name, then renamed.

What a run cannot write it tells in one line (`told`), which `agreed` then makes the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minipar.errors import MiniparError


class WriteFailed(MiniparError, RuntimeError):
    """A file of a run's directory could not be written, though the directory could when the run began."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; the file written there becomes `path` once the block is through.

    If the block fails that file goes, and what `path` held before stays. The name keeps its suffix, by which
    some writers choose a format. Where `path` is a link, the file that it names is replaced.

    Raises:
        OSError: `path` is something else than a plain file, or cannot be replaced.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise FileExistsError(0, "it exists and is no plain file")
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_failed(path: Path, error: OSError, when: str = "") -> WriteFailed:
    """Return what to raise where the system refuses to write `path`; `when` is as "after step 20"."""
    at = f" {when}" if when else ""
    return WriteFailed(f"{path} cannot be written{at}: {error.strerror or error}; make room, or give another --out")


@contextmanager
def told(path: Path, when: str = "") -> Iterator[None]:
    """Tell what the system refuses inside in one line.

    Raises:
        WriteFailed: names the file.
    """
    try:
        yield
    except OSError as error:
        raise write_failed(path, error, when) from None
