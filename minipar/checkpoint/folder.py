"""A directory of checkpoints: their names, the newest, and what happens on the disk when one is saved.

    DIR/step-00000200/              complete: it came to be by one rename, with all that is in it
    DIR/step-00000300.partial/      a save under way, or one that was killed; never read, removed by the next save
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from pathlib import Path

from minipar.checkpoint.manifest import MANIFEST
from minipar.errors import UsageError

NAME = re.compile(r"step-(\d{8,})")
PARTIAL = ".partial"
NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what file systems without locks answer


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the place of a step's checkpoint."""
    return directory / f"step-{step:08d}"


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is one checkpoint, or is called as one, and no directory of them."""
    return (directory / MANIFEST).is_file() or NAME.fullmatch(directory.name) is not None


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def newest(directory: Path) -> Path:
    """Return the newest complete checkpoint in a directory, or the directory itself if it is one.

    A damaged one is not passed over: whoever reads it says what is wrong, and the user chooses.

    Raises:
        UsageError: there is none.
    """
    if is_checkpoint(directory):
        return directory
    found = checkpoints(directory)
    if not found:
        raise UsageError(f"{directory} holds no checkpoint: save one with minipar train --checkpoint {directory}")
    return found[-1]


def begin(directory: Path, step: int) -> int:
    """Make the directory in which a save puts its files; remove those of saves that were killed.

    Returns:
        A descriptor that holds the lock of `directory` until it is closed. The system releases it when the
        process ends in whatever way, so a save under way is told from one that was killed.

    Raises:
        UsageError: there is a checkpoint of this step already, or another job is saving into the directory.
        OSError: the directory cannot be written.
    """
    final = checkpoint_path(directory, step)
    if final.exists():
        raise UsageError(f"{final} exists already: remove it, or save into another directory")
    directory.mkdir(parents=True, exist_ok=True)
    lock = _lock(directory)
    try:
        for path in directory.iterdir():
            if path.name.endswith(PARTIAL) and NAME.fullmatch(path.name.removesuffix(PARTIAL)):
                shutil.rmtree(path)
        final.with_name(final.name + PARTIAL).mkdir()
    except BaseException:
        os.close(lock)
        raise
    return lock


def _lock(directory: Path) -> int:
    """Return a descriptor that holds a directory's lock.

    Some network file systems have no such locks. A second job goes unnoticed there until both save one step.

    Raises:
        UsageError: another job holds it.
    """
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UsageError(
            f"another job is saving into {directory}: end it, or give each job a directory of its own"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(lock)
            raise
    return lock


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
    found = checkpoints(directory)
    for old in found[: max(len(found) - keep, 0)]:
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
