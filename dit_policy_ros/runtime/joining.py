"""How a new chunk joins the one in motion: replaced, blended, or sampled so that it agrees (real-time chunking).

What is in motion is the course, not the chunk behind it: that is what the arm was told, blends and stops included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dit_policy_ros.policy.configuration import PolicyConfig
from dit_policy_ros.policy.realtime import ChunkInMotion
from dit_policy_ros.runtime.course import Course
from dit_policy_ros.runtime.trajectory import Point, Trajectory, states_within

Joining = Literal["replace", "blend", "rtc"]
JOININGS: tuple[Joining, ...] = get_args(Joining)

_DECAY = 0.01  # m of ACT's temporal ensembling, as published


@dataclass(frozen=True)
class Seam:
    """What one chunk taking over from another does to the arm, the largest of any joint, in rad, rad/s, rad/s^2 (or m).

    position: how far apart the two are at the new one's first point. velocity and acceleration: how much those of the
    way there differ, at any moment of it, from those that the arm would have had: to make up 30 mrad within 70 ms is a
    jump of velocity, though both ways are smooth.
    """

    position: float
    velocity: float
    acceleration: float


def seam(course: Course, trajectory: Trajectory, now_ns: int) -> Seam:
    """The seam of a trajectory, sent now, with the course in motion; sampled at five moments up to its first point."""
    velocity = None if trajectory.velocities is None else trajectory.velocities[0]
    first = Point(now_ns + round(float(trajectory.times[0]) * 1e9), trajectory.positions[0], velocity)
    moments = np.linspace(now_ns, first.time_ns, 5).astype(np.int64)
    here = course.execution.states(moments)
    times = np.stack([np.full_like(moments, now_ns), np.full_like(moments, first.time_ns), moments], axis=1)
    there = states_within(course.at(now_ns), first, times)
    position, velocity, acceleration = (
        np.abs(after - before).max(axis=1) for before, after in zip(here, there, strict=True)
    )
    return Seam(float(position[-1]), float(velocity.max()), float(acceleration.max()))


def blend(rows: np.ndarray, due_ns: np.ndarray, course: Course, decay: float = _DECAY) -> np.ndarray:
    """A new chunk's rows (n, A), due at due_ns (n,) int64, averaged with what the course says of the same moments.

    The weights are those of ACT's temporal ensembling (arXiv 2304.13705, algorithm 2), exp(-decay * i) with i = 0 for
    the oldest, times a share of the course that falls evenly over the overlap, and the share of the new chunk that
    rises with it. So the arm leaves the course without a jump, and nothing jumps where the course has no more to say:
    where it only brakes, or is held, it has no weight.
    """
    told = int(np.searchsorted(due_ns, course.told_until_ns, side="right"))
    share = 1 - np.arange(1, told + 1) / (told + 1)
    old, new = share, (1 - share) * np.exp(-decay)
    weight = (old / (old + new))[:, None]
    blended = np.array(rows, np.float64)
    blended[:told] = weight * course.positions(due_ns[:told]) + (1 - weight) * blended[:told]
    return blended


def chunk_in_motion(
    course: Course,
    observation_stamp_ns: int,
    step_duration: float,
    config: PolicyConfig,
    ready_ns: int,
    n_action_steps: int,
    keep_rest: bool = True,
) -> ChunkInMotion | None:
    """The course as the policy's real-time chunking takes it; None if it says nothing of the new chunk's steps.

    Row j is where the course is when the new chunk's row j is due, (j + 1) steps of step_duration (s) after its
    observation: rows due by ready_ns are committed, the rest are those before the course only brakes. Without
    keep_rest, as when the instruction has changed, only committed rows count. The past, for a policy with
    n_obs_steps above 1, is left out where the course is not known so far back.
    """

    def due_ns(first: int, end: int) -> np.ndarray:
        steps = np.arange(first, end) + 1
        return observation_stamp_ns + np.rint(steps * step_duration * 1e9).astype(np.int64)

    steps = config.max_action_steps
    due = due_ns(0, steps)
    committed_until_ns = min(ready_ns, course.end_ns)
    until_ns = max(committed_until_ns, course.told_until_ns) if keep_rest else committed_until_ns
    known = int(np.searchsorted(due, until_ns, side="right"))
    if known == 0:
        return None
    # One step at least is the new chunk's own, however late it is.
    delay = min(int(np.searchsorted(due, committed_until_ns, side="right")), steps - 1)
    past_ns = due_ns(1 - config.n_obs_steps, 0)
    past = None
    if len(past_ns) and course.knows(int(past_ns[0])):
        past = course.positions(past_ns)[None].astype(np.float32)
    return ChunkInMotion(
        actions=course.positions(due[:known])[None].astype(np.float32),  # type: ignore[arg-type]  # arrays are taken too
        delay=delay,
        execution_horizon=min(max(n_action_steps, 1), steps - delay),
        past=past,  # type: ignore[arg-type]
    )
