"""Files that come to be whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
