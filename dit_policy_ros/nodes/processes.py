"""A node as a child process: its output in a log file, its death noticed, its end asked for by signal."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 15


class ChildDied(RuntimeError):
    """A child ended without having been asked to; the message carries the last lines of its log."""


def _die_with_parent() -> None:
    # A demo that is killed outright (SIGKILL, a job's time limit) must not leave a simulator running for days.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Child:
    """A command started in a session of its own, so that Ctrl-C at the terminal reaches only its parent.

    `environment` is added to this process's own: ROS 2 from wheels needs the LD_LIBRARY_PATH that its import sets.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def cpu_seconds(self) -> float:
        """Processor time used so far, user and system, in s."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def last_lines(self) -> str:
        """The end of the child's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])

    def check(self) -> None:
        """Raise ChildDied if the child has ended."""
        status = self._process.poll()
        if status is not None:
            raise ChildDied(
                f"the {self.name} ended with status {status}; the last lines of {self.log}:\n{self.last_lines()}"
            )

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the child has ended."""
        self._process.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Exit status once the child has ended; subprocess.TimeoutExpired after `timeout` seconds."""
        return self._process.wait(timeout)

    def stop(self, patience: float = 15.0) -> int:
        """End the child: SIGINT, after `patience` seconds SIGTERM, then SIGKILL. Returns its exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.send(number)
            try:
                return self.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self._process.kill()
        return self.wait(patience)
