"""A checkpoint of the simulated arm in closed loop, by the simulator's own programs, in processes of their own.

This package runs without ROS and imports no simulator, so what drives them is their command line and their report.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIMULATED_TIME = "dit_policy_ros.sim.rollout"
NODE = "dit_policy_ros.nodes.demo"
STOPPING_S = 20.0  # that a program has to end
HOW = {SIMULATED_TIME: "in simulated time", NODE: "with the policy node over DDS, in real time"}


class ClosedLoopError(ValueError):
    """Why a program could not be run to its end; the message is its own."""


def in_simulated_time(checkpoint: Path, options: Mapping[str, Any], threads: int = 1) -> dict[str, Any]:
    """The report of `python -m dit_policy_ros.sim.rollout` with these options, and `how`. Raises ClosedLoopError."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        arguments = [f"--{name}={value}" for name, value in options.items()]
        _run(SIMULATED_TIME, [f"--checkpoint={checkpoint}", f"--output={output}", *arguments], (0,), threads)
        report: dict[str, Any] = json.loads(output.read_text())
    return report | {
        "how": HOW[SIMULATED_TIME],
        "refused_by_reason": report["refused"],
        "refused": sum(report["refused"].values()),
    }


def with_node(checkpoint: Path, episodes: int, output: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The report of `python -m dit_policy_ros.nodes.demo`, which also leaves pictures in `output`, and `how`.

    `parameters` are the node's. The exit status 1 with a report means that its bars do not hold, which is a result.
    Raises ClosedLoopError.
    """
    path = output / "report.json"
    path.unlink(missing_ok=True)
    arguments = [f"--checkpoint={checkpoint}", f"--episodes={episodes}", f"--output={output}", "--video-episodes=0"]
    arguments += [f"--parameter={name}={value}" for name, value in parameters.items()]
    said = _run(NODE, arguments, (0, 1), None)
    if not path.is_file():
        raise ClosedLoopError(f"the demo ended without a report:\n{said}")
    report: dict[str, Any] = json.loads(path.read_text())
    return report | {"how": HOW[NODE], "refused": report["rejected"]}


def _run(module: str, arguments: Sequence[str], sound: tuple[int, ...], threads: int | None) -> str:
    """Run a module to its end; what it said at last."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            _stop(process)
            raise
    said = "\n".join((errors.strip() or output.strip()).splitlines()[-8:])
    if process.returncode not in sound:
        raise ClosedLoopError(f"python -m {module} ended with {process.returncode}:\n{said}")
    return said


def _stop(process: "subprocess.Popen[str]") -> None:
    """End it as Ctrl-C would: killed, it would leave behind the processes it has started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOPPING_S)
    except subprocess.TimeoutExpired:
        process.kill()
