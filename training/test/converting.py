"""Conversions for tests: run here or as the command, disturbed on the way, and compared by what their datasets hold."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pandas as pd
import toy_robot
from dit_policy_training.conversion.options import ConvertConfig, VideoOptions

# Of all codecs the quickest for pictures as small as the toy robot's, and it keeps the colour of small things.
VIDEO = VideoOptions(codec="h264", crf=18, preset="superfast", pix_fmt="yuv444p")


def config_for(bags: Path | str, embodiment: Path, output: Path, **changes: Any) -> ConvertConfig:
    """Toy bags to a dataset."""
    return replace(ConvertConfig(str(bags), embodiment, output, video=VIDEO), **changes)


def arguments(bags: Path | str, embodiment: Path, output: Path, *more: str) -> list[str]:
    """The same for the command line."""
    video = [f"--video.{name}={getattr(VIDEO, name)}" for name in ("codec", "crf", "preset", "pix_fmt")]
    return [f"--bags={bags}", f"--embodiment={embodiment}", f"--output={output}", *video, *more]


class Launcher:
    """Starts commands of the package, each in a process group of its own, without their seconds of imports."""

    def __init__(self, folder: Path):
        """`folder`: for what the commands print."""
        self._folder, self._count = folder, 0
        script = Path(__file__).with_name("launcher.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    @contextmanager
    def command(self, arguments: list[str], module: str = "convert", **environment: str) -> Iterator["Command"]:
        """A running command, of which nothing is left afterwards."""
        self._count += 1
        output = self._folder / f"{self._count}.txt"
        order = {"arguments": arguments, "environment": environment, "output": str(output)}
        started = Command(self.ask(module=f"dit_policy_training.{module}", **order), output, self)
        try:
            yield started
        finally:
            if started.processes():
                started.signal(signal.SIGKILL)
            started.wait()

    def run(self, arguments: list[str], module: str = "convert", **environment: str) -> tuple[int, str]:
        """Run a command to its end."""
        with self.command(arguments, module, **environment) as started:
            return started.finish()

    def ask(self, **order: Any) -> int:
        """See launcher.py."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


class Command:
    """A running command of a Launcher."""

    def __init__(self, pid: int, output: Path, launcher: Launcher):
        self.pid = pid
        self._output, self._launcher = output, launcher
        self._status: int | None = None

    def wait(self) -> int:
        """Exit status; less than 0: killed by that signal."""
        if self._status is None:
            self._status = self._launcher.ask(wait=self.pid)
        return self._status

    def finish(self) -> tuple[int, str]:
        """Exit status and everything that it printed, in which there must be no traceback."""
        status = self.wait()
        output = self._output.read_text()
        assert "Traceback" not in output, output
        return status, output

    def until(self, happened: Callable[[], Any]) -> Any:
        """What `happened` returns as soon as it is true; None if the command ended before."""
        while _group(self.pid) is not None:
            if found := happened():
                return found
            time.sleep(0.001)
        return None

    def signal(self, number: int) -> None:
        """To the whole group, as a terminal's Ctrl-C."""
        os.killpg(self.pid, number)

    def processes(self) -> list[int]:
        """Every process of the group."""
        return [pid for pid in _pids() if _group(pid) == self.pid]


def writer_of(shards: Path) -> int | None:
    """The process that is writing a shard: it has a file open under a name that is not final."""
    for pid in _pids():
        try:
            opened = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(f"{shards.resolve()}/.partial-") for name in opened):
            return pid
    return None


def tree(folder: Path) -> list[str]:
    """Everything that is in a folder now."""
    return [str(Path(parent) / name) for parent, folders, files in os.walk(folder) for name in (*folders, *files)]


def digest(dataset: Path) -> dict[str, str]:
    """A hash of what each file of a dataset holds: a table's values, a video's decoded frames, else the bytes."""
    return {
        str(path.relative_to(dataset)): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(dataset.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> bytes:
    if path.suffix == ".parquet":
        return pd.read_parquet(path).to_json(double_precision=15).encode()
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0))
    return path.read_bytes()


def long_bag(folder: Path, seconds: float = 40.0) -> Path:
    """A bag that takes long enough to be disturbed on the way."""
    return toy_robot.write_bag(folder, toy_robot.messages(seconds, "push the long block"))


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _group(pid: int) -> int | None:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    status, _, group = re.sub(r".*\) ", "", state).split()[:3]  # the name before it may hold anything
    return None if status == "Z" else int(group)
