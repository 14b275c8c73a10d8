"""A step of the set-up: taken when its inputs changed, retaken after an interruption, plain about its failures."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL = 15  # lines of a failed command's log that are shown


class StepFailed(Exception):
    """A step cannot be completed: the cause and the remedy, both for the user's eyes."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy


@dataclass(frozen=True)
class Step:
    """A unit of work with a stamp that vouches for its result.

    The stamp is a file inside what the step makes (a folder deleted takes its stamp along), holding the fingerprint of
    the inputs. It is removed before the work starts and written after it succeeded, so an interruption leaves none.
    `work(log, afresh)` gets the path of its log, and whether no earlier success is there to build upon: none at all, or
    one on another `basis`. `intact()` looks, quickly, at what may have changed behind the stamp's back.
    """

    name: str
    stamp: Path
    fingerprint: str
    work: Callable[[Path, bool], None]
    basis: str = ""
    intact: Callable[[], bool] = lambda: True

    def done(self) -> bool:
        """Whether the last success had these inputs and still stands."""
        return read(self.stamp) == self._text and self.intact()

    def run(self, logs: Path) -> None:
        """Do the work and stamp it; StepFailed if that cannot be done."""
        earlier = read(self.stamp)
        afresh = earlier is None or not earlier.startswith(self.basis)
        self.stamp.unlink(missing_ok=True)
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{self.name}.log"
        log.unlink(missing_ok=True)
        self.work(log, afresh)
        write(self.stamp, self._text)

    @property
    def _text(self) -> str:
        return self.basis + self.fingerprint


def fingerprint(*facts: object, contents: Iterable[Path] = (), names: Iterable[Path] = ()) -> str:
    """One short text for some facts, the contents of files, and the names of others."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact}\n".encode())
    for path in sorted(contents):
        digest.update(f"{path}\n".encode() + path.read_bytes())
    for path in sorted(names):
        digest.update(f"{path}\n".encode())
    return digest.hexdigest()[:16]


def read(path: Path) -> str | None:
    """The text of a file, None if it is not there."""
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write(path: Path, text: str) -> None:
    """Replace a file's text in one go, keeping its mode.

    Never in place: uv links a wheel's files from its cache, and writing into one would change every environment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(text)
    if path.exists():
        new.chmod(path.stat().st_mode)
    new.replace(path)


def command(
    arguments: Sequence[str | Path],
    log: Path,
    remedy: str,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> None:
    """Run a command, its output going to the log; StepFailed with the log's last lines if it fails."""
    line = " ".join(str(argument) for argument in arguments)
    with log.open("a") as output:
        output.write(f"$ {line}\n")
        output.flush()
        start = output.tell()
        try:
            status: int | str = subprocess.run(
                arguments, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, timeout=timeout
            ).returncode
        except OSError as error:
            status = str(error)
        except subprocess.TimeoutExpired:
            status = f"no end after {timeout:.0f} s"
    if status != 0:
        with log.open(errors="replace") as written:
            written.seek(start)
            tail = [text.rstrip() for text in written.readlines()[-TAIL:]]
        shown = "".join(f"\n    {text}" for text in tail)
        raise StepFailed(f"`{line}` failed ({status}); its last lines:{shown}\n  log:    {log}", remedy)
