"""Conversions for tests: run here or as the command, disturbed on the way, and compared by what their datasets hold."""

import hashlib
import os
import re
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


class Command:
    """A command of the package in a process group of its own."""

    def __init__(self, arguments: list[str], module: str = "convert", **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"dit_policy_training.{module}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | environment,
        )

    def finish(self) -> tuple[int, str]:
        """Exit status and everything that it printed, in which there must be no traceback."""
        output, _ = self.process.communicate()
        assert "Traceback" not in output, output
        return self.process.returncode, output

    def until(self, happened: Callable[[], Any]) -> Any:
        """What `happened` returns as soon as it is true; None if the command ended before."""
        while self.process.poll() is None:
            if found := happened():
                return found
            time.sleep(0.001)
        return None

    def signal(self, number: int) -> None:
        """To the whole group, as a terminal's Ctrl-C."""
        os.killpg(self.process.pid, number)

    def processes(self) -> list[int]:
        """Every process of the group."""
        return [pid for pid in _pids() if _group(pid) == self.process.pid]


@contextmanager
def command(arguments: list[str], module: str = "convert", **environment: str) -> Iterator[Command]:
    """A Command, of which nothing is left afterwards."""
    started = Command(arguments, module, **environment)
    try:
        yield started
    finally:
        if left := started.processes():
            started.signal(9)
            assert left
        started.process.wait()


def run(arguments: list[str], module: str = "convert", **environment: str) -> tuple[int, str]:
    """Run a command to its end."""
    with command(arguments, module, **environment) as started:
        return started.finish()


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


def tree(folder: Path) -> frozenset[tuple[str, int]]:
    """Names and sizes of everything in a folder."""
    found = set()
    for path in folder.rglob("*"):
        try:
            found.add((str(path), path.stat().st_size))
        except FileNotFoundError:
            continue
    return frozenset(found)


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
