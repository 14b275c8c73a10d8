"""What runs on a machine of Modal: an attempt at a training run, in a process of its own. Imports no modal.

An attempt ends before the machine's time does, with a checkpoint, and the next goes on from there: exactly, since that
is what a checkpoint is for. The run's folder on the volume remembers which launch it belongs to.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dit_policy_training.loop.arguments import given

LAUNCH = ".launch"  # in the run's folder: the launch that it belongs to
POLL = 5.0  # seconds between two looks at the checkpoints
LOCAL_CACHE = "/tmp/dit_policy_cache"  # a memory-mapped file on the volume would be read over the network


class MoreToDo(RuntimeError):
    """The attempt ended, the run did not: it is to be tried again, and will go on."""


class RunFailed(RuntimeError):
    """The run cannot be: trying again would come to the same."""


@dataclass(frozen=True)
class Job:
    """A run, in words that can be sent. Paths are relative to the volume."""

    launch: str  # a name that no other launch has
    arguments: list[str]  # of dit_policy_training.train
    settings: str  # the text of the file that --config named; empty: none
    output_dir: str
    processes: int  # one a GPU
    seconds: float  # after which the attempt stops and saves


def run_job(job: Job, root: Path, commit: Callable[[], None], poll: float = POLL) -> int:
    """An attempt, with `root` as the working folder; `commit` is called after each checkpoint and at the end.

    Returns the step that the run has come to, its last. Raises MoreToDo where time was up, or something broke after the
    run had got further; RunFailed where it broke without.
    """
    output = root / job.output_dir
    continues = (output / LAUNCH).is_file() and (output / LAUNCH).read_text() == job.launch
    before = last_step(output) if continues else -1
    arguments = continued(job) if before >= 0 else list(job.arguments)
    output.mkdir(parents=True, exist_ok=True)
    (output / LAUNCH).write_text(job.launch)
    if job.settings:
        settings = output / ".settings.yaml"
        settings.write_text(job.settings)
        arguments = [f"--config={settings.relative_to(root)}", *arguments]
    if not given(arguments, "cache_dir"):
        arguments.append(f"--cache_dir={LOCAL_CACHE}")
    deadline = time.monotonic() + job.seconds
    status, was_stopped = _attempt(command(arguments, job.processes), root, output, deadline, commit, poll)
    commit()
    step = last_step(output)
    if status == 0 and not was_stopped:
        return step
    if was_stopped:
        raise MoreToDo(f"time was up at step {step}: the next attempt goes on from there")
    if step > before:
        raise MoreToDo(f"training ended with status {status} at step {step}, further than before: it is tried again")
    raise RunFailed(f"training ended with status {status}; its output, above, says why")


def command(arguments: Sequence[str], processes: int) -> list[str]:
    """One process, or several by torchrun."""
    module = ["-m", "dit_policy_training.train", *arguments]
    if processes == 1:
        return [sys.executable, *module]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *module]


def continued(job: Job) -> list[str]:
    """The arguments of an attempt that goes on: what was chosen at first holds, what begins a run does not, be it said
    there or in the file of settings.
    """
    beginnings = ("--checkpoint_path", "--finetune", "--overwrite")
    kept = [argument for argument in job.arguments if argument.partition("=")[0] not in beginnings]
    return [*kept, f"--checkpoint_path={job.output_dir}/checkpoints/last", "--finetune=false", "--overwrite=false"]


def last_step(output: Path) -> int:
    """Of the last checkpoint, whose folder is called by it; -1 without."""
    last = output / "checkpoints" / "last"
    return int(last.resolve().name) if last.exists() else -1


def _attempt(
    parts: Sequence[str], root: Path, output: Path, deadline: float, commit: Callable[[], None], poll: float
) -> tuple[int, bool]:
    """(Exit status, whether it was told to stop), of a command that runs until it ends or its time is up."""
    process = subprocess.Popen(parts, cwd=root)
    committed, was_stopped = last_step(output), False
    try:
        while True:
            try:
                return process.wait(timeout=poll), was_stopped
            except subprocess.TimeoutExpired:
                pass
            if (step := last_step(output)) != committed:
                commit()
                committed = step
            if time.monotonic() > deadline and not was_stopped:
                was_stopped = True
                stop(process.pid)
    except BaseException:  # the machine is taken away, and says so by a signal
        stop(process.pid)
        process.wait()
        commit()
        raise


def stop(process: int) -> None:
    """Ask the trainers to save and end. torchrun itself would kill them after half a minute, so it is left alone."""
    children = Path(f"/proc/{process}/task/{process}/children")
    torchrun = b"torch.distributed.run" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    for each in children.read_text().split() if torchrun else [process]:
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(int(each), signal.SIGTERM)
