"""One conversion into an output at a time. The lock is the kernel's: it ends with the process that holds it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = ".lock"


class LockedError(ValueError):
    """Another conversion is at work on the same output, or it cannot be written."""


@contextmanager
def locked(folder: Path, part: str = "") -> Iterator[None]:
    """Hold `folder`, made if it is not there. A part of a job (`part`: its name) excludes only its like, and the whole.

    Raises LockedError if it is held, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LockedError(f"{folder} cannot be made: {error.strerror}; give an --output where you may write") from error
    whole = fcntl.LOCK_SH if part else fcntl.LOCK_EX
    with _held(folder / _LOCK, whole, folder):
        if not part:
            yield
            return
        with _held(folder / f"{_LOCK}-{part}", fcntl.LOCK_EX, folder):
            yield


@contextmanager
def _held(path: Path, kind: int, folder: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # no worker inherits it: it may live a moment longer
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = f"another conversion is at work in {folder}; wait for it, or give another --output"
            raise LockedError(reason) from None
        yield
    finally:
        os.close(descriptor)
