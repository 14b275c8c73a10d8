"""The figures of a demo run: when an episode is over and how, and `report.json` with the bars that must hold."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from dit_policy_ros.sim.task import SETTLED_S, TIME_LIMIT, judge

MIN_SUCCESS = 0.90  # share of the episodes
MAX_WRONG_BLOCK = 0.05
_REPORTED_VERSIONS = ("dit_policy_ros", "torch", "numpy", "mujoco", "transformers", "ros-rclpy")


@dataclass(frozen=True)
class Snapshot:
    """The scene at one moment: enough to render it again later, without disturbing the run.

    `time` in s since the episode began; `joints` by name, rad (m for the finger); `blocks` by colour, x and y in m, yaw
    in rad.
    """

    time: float
    joints: dict[str, float]
    blocks: dict[str, tuple[float, float, float]]


@dataclass
class Episode:
    """One instruction given in one scene, and what came of it."""

    number: int
    seed: int
    instruction: str
    success: bool = False
    wrong_block: bool = False
    outcome: str = ""  # in words; empty while it runs
    duration: float = 0.0  # s, from activation to the verdict
    moved: dict[str, float] = field(default_factory=dict)  # m, by colour
    chunk_seconds: list[float] = field(default_factory=list)  # inference time of each chunk sampled
    rejected: int = 0  # chunks refused by the gate, or lost to an error
    stale: int = 0  # inferences skipped because an input was missing or too old
    trace: list[Snapshot] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether there is a verdict."""
        return bool(self.outcome)

    def row(self) -> dict[str, Any]:
        """The episode as a JSON object, without its trace."""
        return {
            "episode": self.number,
            "seed": self.seed,
            "instruction": self.instruction,
            "success": self.success,
            "wrong_block": self.wrong_block,
            "outcome": self.outcome,
            "duration_s": round(self.duration, 2),
            "moved_m": {colour: round(distance, 4) for colour, distance in self.moved.items()},
            "chunks": len(self.chunk_seconds),
            "rejected": self.rejected,
            "stale": self.stale,
        }


class Referee:
    """Watches an episode and ends it: as soon as it has succeeded for 0.3 s, spoiled another block, or run out of time.

    `start` tells where the blocks stood when it began, as in a Snapshot.
    """

    def __init__(self, episode: Episode, target: str, start: Mapping[str, tuple[float, float, float]]) -> None:
        self._episode = episode
        self._target = target
        self._start = start
        self._succeeded_at: float | None = None

    def see(self, snapshot: Snapshot) -> None:
        """Note the next snapshot in the episode, and the verdict once there is one."""
        episode, now = self._episode, snapshot.time
        result = judge(self._target, self._start, snapshot.blocks)
        episode.trace.append(snapshot)
        episode.duration, episode.moved = now, result.moved
        if not result.success:
            self._succeeded_at = None
        elif self._succeeded_at is None:
            self._succeeded_at = now
        if result.wrong_block:
            episode.wrong_block, episode.outcome = True, "moved another block"
        elif self._succeeded_at is not None and now - self._succeeded_at >= SETTLED_S:
            episode.success, episode.outcome = True, "over the line"
        elif now >= TIME_LIMIT:
            episode.outcome = "time limit"


def report(episodes: Sequence[Episode], control: str, context: dict[str, Any]) -> dict[str, Any]:
    """The content of `report.json`; `context` is added as it is.

    `holds` says whether the bars do. The control `blank_images` has none: a policy that sees nothing is expected to
    fail, and how often it does is the result.
    """
    seconds = [duration for episode in episodes for duration in episode.chunk_seconds]
    success = sum(episode.success for episode in episodes)
    wrong = sum(episode.wrong_block for episode in episodes)
    bars = [] if control == "blank_images" else _bars(success, wrong, len(episodes))
    return {
        "holds": all(bar["holds"] for bar in bars),
        "control": control,
        "episodes": len(episodes),
        "success": success,
        "wrong_block": wrong,
        "chunks": len(seconds),
        "chunk_ms": {"p50": _percentile_ms(seconds, 50), "p95": _percentile_ms(seconds, 95)},
        "rejected": sum(episode.rejected for episode in episodes),
        "stale": sum(episode.stale for episode in episodes),
        "seeds": [episode.seed for episode in episodes],
        "rows": bars,
        "results": [episode.row() for episode in episodes],
        **context,
        "machine": machine(),
        "versions": versions(),
    }


def _bars(success: int, wrong: int, episodes: int) -> list[dict[str, Any]]:
    how = f"{episodes} unseen scenes, policy node and simulator in two processes over DDS, real time"
    shares = (
        ("success", success / episodes, f">= {MIN_SUCCESS}", success / episodes >= MIN_SUCCESS),
        ("wrong_block", wrong / episodes, f"<= {MAX_WRONG_BLOCK}", wrong / episodes <= MAX_WRONG_BLOCK),
    )
    return [
        {"name": name, "value": share, "unit": "share of episodes", "bar": bar, "holds": holds, "how": how}
        for name, share, bar, holds in shares
    ]


def _percentile_ms(seconds: Sequence[float], percentile: float) -> float | None:
    """None when there was no chunk: JSON has no NaN."""
    return round(float(np.percentile(seconds, percentile)) * 1e3, 1) if seconds else None


def machine() -> dict[str, Any]:
    """The processor, the cores this process may use, and the system."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on; ROS from a distribution says which."""
    found = {"python": platform.python_version()}
    for name in _REPORTED_VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if "ROS_DISTRO" in os.environ:
        found["ros"] = os.environ["ROS_DISTRO"]
    return found
