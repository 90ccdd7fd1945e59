"""A directory of checkpoints: their names, the newest, and what happens on the disk when one is saved.

    DIR/step-00000200/              complete: it came to be by one rename, with all that is in it
    DIR/step-00000300.partial/      a save under way, or one that was killed; never read, removed by the next save
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from minipar.checkpoint.manifest import MANIFEST
from minipar.errors import UsageError

NAME = re.compile(r"step-(\d{8,})")
PARTIAL = ".partial"


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the place of a step's checkpoint."""
    return directory / f"step-{step:08d}"


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def newest(directory: Path) -> Path:
    """Return the newest complete checkpoint in a directory, or the directory itself if it is one.

    A damaged one is not passed over: whoever reads it says what is wrong, and the user chooses.

    Raises:
        UsageError: there is none.
    """
    if (directory / MANIFEST).is_file() or NAME.fullmatch(directory.name):
        return directory
    found = checkpoints(directory)
    if not found:
        raise UsageError(f"{directory} holds no checkpoint: save one with minipar train --checkpoint {directory}")
    return found[-1]


def begin(directory: Path, step: int) -> Path:
    """Make and return the directory in which a save puts its files; remove those of saves that were killed.

    Raises:
        UsageError: there is a checkpoint of this step already.
        OSError: the directory cannot be written.
    """
    final = checkpoint_path(directory, step)
    if final.exists():
        raise UsageError(f"{final} exists already: remove it, or save into another directory")
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if path.name.endswith(PARTIAL) and NAME.fullmatch(path.name.removesuffix(PARTIAL)):
            shutil.rmtree(path)
    partial = final.with_name(final.name + PARTIAL)
    partial.mkdir()
    return partial


def finish(partial: Path, manifest: str) -> Path:
    """Write the manifest as the last of a checkpoint's files, and give the checkpoint its name.

    Everything is on the disk before the rename, and the rename is before this returns.
    """
    with (partial / MANIFEST).open("xb") as file:
        file.write(manifest.encode())
        file.flush()
        os.fsync(file.fileno())
    flush_directory(partial)
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    partial.rename(final)
    flush_directory(final.parent)
    return final


def remove_old(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; one that is half removed is not taken for a checkpoint."""
    for old in checkpoints(directory)[:-keep]:
        going = old.with_name(old.name + PARTIAL)
        old.rename(going)
        shutil.rmtree(going)


def flush_directory(directory: Path) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
