"""10,000 random chunk sequences from the chunk to the controller's reference: every message taken, every instant safe.

Each sequence drives a random robot's controllers with delayed, lost, blended, clamped, extreme and broken chunks, with
stops, controllers reset and a node's clock that jumps, through the parts that the node uses. What a controller then
does is computed a second time here, with formulas of this file, densely and in closed form.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dit_policy_ros.embodiment import ActionGroup, Camera, Embodiment, JointLimits, State
from dit_policy_ros.runtime import gate
from dit_policy_ros.runtime.chunking import Chunk, drop_elapsed
from dit_policy_ros.runtime.commands import Rejection
from dit_policy_ros.runtime.course import JITTER_NS, Course
from dit_policy_ros.runtime.gate import Gate
from dit_policy_ros.runtime.joining import blend
from dit_policy_ros.runtime.trajectory import Point, Trajectory, plan
from dit_policy_ros.runtime.trajectory import stop as real_stop
from dit_policy_ros.sim.trajectory_controller import TrajectoryController

SEQUENCES, BATCHES, UPDATES = 10_000, 10, 3
NS = 1_000_000_000
stop = real_stop  # under a name of its own, so that a test may take it away
START = 1_700_000_000 * NS
TOLERANCE = 1e-5  # rad, rad/s: the gate lets 1e-6 pass for the rounding of float32
LATENCY_NS = 20_000_000  # the longest that a message takes, besides its jitter
U = np.linspace(0, 1, 25)[:, None, None]


# --- random robots and chunks ----------------------------------------------------------------------------------------


def random_robot(rng: np.random.Generator) -> Embodiment:
    groups, number = [], 0
    for group in range(rng.integers(1, 4)):
        limits = {}
        for _ in range(rng.integers(1, 9)):
            lower, width = rng.uniform(-3, 1), 10 ** rng.uniform(-1, 0.8)
            velocity, acceleration = 10 ** rng.uniform(-0.5, 0.6), 10 ** rng.uniform(0, 1.3)
            limits[f"joint{number}"] = JointLimits(lower, lower + width, velocity, acceleration)
            number += 1
        groups.append(ActionGroup(f"group{group}", f"controller{group}", "trajectory", limits))
    joints = tuple(joint for group in groups for joint in group.joints)
    camera = Camera("front", "image", "raw", 8, 8, 0.3)
    return Embodiment("random", 10, "instruction", (camera,), 0.1, State("joint_states", joints, 0.2), tuple(groups))


@dataclass(frozen=True)
class Arm:
    """A robot's limits as arrays (J,)."""

    robot: Embodiment
    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray

    @classmethod
    def of(cls, robot: Embodiment) -> Arm:
        limits = robot.limits.values()
        names = ("lower", "upper", "velocity", "acceleration")
        return cls(robot, *(np.array([getattr(joint, name) for joint in limits]) for name in names))

    def somewhere(self, rng: np.random.Generator) -> np.ndarray:
        """A position within the limits, some joints at one."""
        share = rng.uniform(-0.15, 1.15, len(self.lower)).clip(0, 1)
        return self.lower + share * (self.upper - self.lower)


def towards(arm: Arm, here: Point, times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A smooth motion (n, J) to some place, at rest there; at times (n,) after the state `here`; some are too fast."""
    way = arm.somewhere(rng) - here.position
    shortest = max((1.5 * np.abs(way) / arm.velocity).max(), np.sqrt(6 * np.abs(way) / arm.acceleration).max(), 0.1)
    duration = shortest * rng.choice([0.7, 1.05, 1.5, 4.0])
    u = np.minimum(times / duration, 1)[:, None]
    speed = here.velocity * duration
    return here.position + speed * u * (1 - u) ** 2 + way * u**2 * (3 - 2 * u)


def broken(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows = rows.copy()
    if rng.random() < 0.2:
        return rows[:, :-1] if rng.random() < 0.5 else rows[0]
    with np.errstate(over="ignore"):
        rows[rng.integers(len(rows)), rng.integers(rows.shape[1])] = rng.choice([np.nan, np.inf, -np.inf, 1e300, 7.0])
    return rows


def random_rows(arm: Arm, here: Point, times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows = towards(arm, here, times, rng)
    kind = rng.random()
    if kind < 0.6:
        return rows
    if kind < 0.8:  # the noise of a policy, smooth or not
        return rows + rng.normal(0, rng.choice([1e-4, 1e-3, 1e-2]), rows.shape)
    if kind < 0.9:  # anywhere, beyond the limits too
        return rows + rng.uniform(-0.5, 0.5, rows.shape) * (arm.upper - arm.lower)
    if kind < 0.95:  # a step: all rows at one far place
        return np.tile(arm.somewhere(rng), (len(rows), 1))
    return broken(rows, rng)


# --- what a controller does, a second time ---------------------------------------------------------------------------


@dataclass
class Follower:
    """One group's controller, and beside it the way it takes: knots (k,), (k, J), (k, J), the last one held."""

    controller: TrajectoryController
    columns: slice
    latency_ns: int
    cycle_ns: int
    stamps: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray

    def state(self, t_ns: int) -> Point:
        if t_ns >= self.stamps[-1] or len(self.stamps) == 1:
            return Point(t_ns, self.positions[-1], self.velocities[-1])
        k = max(int(np.searchsorted(self.stamps, t_ns, side="right")) - 1, 0)
        duration = float(self.stamps[k + 1] - self.stamps[k]) / NS
        u = float(t_ns - self.stamps[k]) / NS / duration
        position, speed = cubic(self.positions[k : k + 2], self.velocities[k : k + 2], duration, np.array(u))
        return Point(t_ns, position[0], speed[0])

    def hold(self, t_ns: int, position: np.ndarray) -> None:
        self.controller.reset()
        zeros = np.zeros_like(position)
        self.controller.update(t_ns, position, zeros)
        self.stamps, self.positions, self.velocities = np.array([t_ns]), position[None], zeros[None]


def cubic(p: np.ndarray, v: np.ndarray, duration: Any, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities at u of the segments between neighbouring knots (k, J), in Hermite's form."""
    d = np.asarray(duration)
    p0, p1, v0, v1 = p[:-1], p[1:], v[:-1] * d, v[1:] * d
    position = (1 + 2 * u) * (1 - u) ** 2 * p0 + u * (1 - u) ** 2 * v0 + u**2 * (3 - 2 * u) * p1 + u**2 * (u - 1) * v1
    speed = 6 * u * (1 - u) * (p1 - p0) + (1 - u) * (1 - 3 * u) * v0 + u * (3 * u - 2) * v1
    return position, speed / d


def extremes(stamps: np.ndarray, p: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest and highest position and highest speed (J,) of all segments: densely, and at the cubics' own turns."""
    duration = (np.diff(stamps) / NS)[:, None]
    v0, v1, way = v[:-1] * duration, v[1:] * duration, p[1:] - p[:-1]
    third, second, first = 3 * (v0 + v1 - 2 * way), 2 * (3 * way - 2 * v0 - v1), v0  # of the derivative in u
    with np.errstate(all="ignore"):
        root = np.sqrt(second**2 - 4 * third * first)
        turns = np.nan_to_num(np.stack([(root - second) / (2 * third), -(root + second) / (2 * third)]), nan=0.0)
        vertex = np.nan_to_num(-second / (2 * third), nan=0.0)[None]
    u = np.concatenate([np.broadcast_to(U, (len(U), *way.shape)), np.clip(turns, 0, 1), np.clip(vertex, 0, 1)])
    positions, speeds = cubic(p, v, duration, u)
    return positions.min(axis=(0, 1)), positions.max(axis=(0, 1)), np.abs(speeds).max(axis=(0, 1))


# --- one sequence ----------------------------------------------------------------------------------------------------


def message(trajectory: Trajectory) -> SimpleNamespace:
    """As nodes.conversions.trajectory_message makes it, without ROS."""
    points = []
    for time, position, velocity in zip(trajectory.times, trajectory.positions, trajectory.velocities, strict=True):
        sec, nanosec = divmod(round(float(time) * NS), NS)
        stamp = SimpleNamespace(sec=sec, nanosec=nanosec)
        points.append(
            SimpleNamespace(
                positions=position.tolist(),
                velocities=velocity.tolist(),
                accelerations=[],
                effort=[],
                time_from_start=stamp,
            )
        )
    header = SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=0))
    return SimpleNamespace(header=header, joint_names=list(trajectory.joint_names), points=points)


class Sequence:
    """One robot, one node's memory, a few updates of random kinds."""

    def __init__(self, arm: Arm, rng: np.random.Generator, seen: Counter[str]) -> None:
        self.arm, self.rng, self.seen = arm, rng, seen
        seen["sequences"] += 1
        self.gate = Gate(arm.robot, max_start_distance=rng.choice([0.35, 3.0]))
        self.gate.position_margin = rng.choice([0.0, 0.005])
        self.from_desired = bool(rng.random() < 0.5)
        self.step = 1 / rng.uniform(5, 50)
        self.t_ns, self.offset_ns = START, 0
        self.course: Course | None = None
        self.followers = []
        here, column = arm.somewhere(rng), 0
        for group in arm.robot.action_groups:
            columns = slice(column, column := column + len(group.joints))
            controller = TrajectoryController(tuple(group.joints), interpolate_from_desired_state=self.from_desired)
            latency_ns, cycle_ns = int(rng.integers(LATENCY_NS)), int(rng.integers(1, 2_000_000))
            follower = Follower(controller, columns, latency_ns, cycle_ns, *(np.zeros(0),) * 3)
            follower.hold(self.t_ns, here[columns])
            self.followers.append(follower)

    def run(self) -> None:
        for _ in range(UPDATES):
            self.t_ns += int(self.rng.uniform(0.01, 0.6) * NS) + LATENCY_NS
            self.measured = self.measure()
            kind = self.rng.random()
            if kind < 0.75:
                self.chunk()
            elif kind < 0.88:
                self.bring_to_rest(self.now_ns)
            elif kind < 0.94:
                self.reset()
            else:
                self.jump()

    @property
    def now_ns(self) -> int:
        """The node's clock, which may jump; the controllers' is t_ns."""
        return self.t_ns + self.offset_ns

    def measure(self) -> Point:
        """The arm at t_ns, near its reference; it goes on at this velocity until a message is taken up."""
        states = [follower.state(self.t_ns) for follower in self.followers]
        position = np.concatenate([state.position for state in states])
        velocity = np.concatenate([state.velocity for state in states]) * self.rng.choice([0.0, 0.9, 1.0])
        position = np.clip(position + self.rng.normal(0, 0.01, len(position)), self.arm.lower, self.arm.upper)
        later = position + velocity * 2 * LATENCY_NS / NS
        velocity[(later < self.arm.lower) | (later > self.arm.upper)] = 0.0
        return Point(self.t_ns, position, velocity)

    def starts(self) -> list[Point]:
        known = [] if self.course is None else list(self.course.starts(self.now_ns))
        if self.from_desired and known:
            return known
        if self.from_desired:  # after a reset it holds where it is
            return [Point(0, np.concatenate([f.positions[-1] for f in self.followers]))]
        return [*known, *self.measurable()]

    def measurable(self) -> list[Point]:
        """The states that a controller may measure when it takes a message up."""
        ahead = self.measured.position + self.measured.velocity * 2 * LATENCY_NS / NS
        return [self.measured, Point(0, ahead, self.measured.velocity)]

    def chunk(self) -> None:
        rng = self.rng
        delay = rng.choice([rng.uniform(0, 0.3), 1.5, -0.05], p=[0.94, 0.04, 0.02])
        observed_ns = self.now_ns - int(delay * NS)
        here = self.starts()[0] if self.course is None else self.course.at(observed_ns)
        here = Point(0, here.position, np.zeros_like(here.position) if here.velocity is None else here.velocity)
        times = np.arange(1, rng.integers(2, 24)) * self.step
        rows = random_rows(self.arm, here, times, rng)
        joints = self.arm.robot.action_joints
        if rng.random() < 0.02:
            joints = joints[::-1]
        chunk = Chunk(observed_ns, 0, joints, rows, self.step, 8, "push", delay)
        rows, times, _ = drop_elapsed(chunk, self.now_ns)
        if rng.random() < 0.3 and rows.ndim == 2 and rows.shape[1] == len(self.arm.lower):
            rows, clamped = self.gate.clamp(rows)
            self.seen["clamped"] += clamped > 0
        if rng.random() < 0.5 and self.course is not None and rows.shape == (len(times), len(self.arm.lower)):
            rows = blend(rows, chunk.due_times_ns[-len(times) :] if len(times) else np.zeros(0, np.int64), self.course)
            self.seen["blended"] += 1
        starts = self.starts()
        admission = self.gate.admit(rows, times, joints, starts, self.measured.position, observed_ns, self.now_ns)
        self.seen[admission.decision.verdict.name] += 1
        assert admission.decision.accepted == (admission.trajectory is not None)
        assert admission.decision.accepted == (admission.decision.reason == "")
        if admission.trajectory is None or rng.random() < 0.05:  # lost with the node that was about to send it
            return
        self.send(admission.trajectory, starts, starts[0])

    def bring_to_rest(self, reference_ns: int) -> None:
        if self.course is None:
            return
        starts = [*self.course.starts(reference_ns), *([] if self.from_desired else self.measurable())]
        self.seen["stopped"] += 1
        self.send(stop(self.arm.robot.action_joints, starts[0], self.gate.limits, starts[1:]), starts, starts[0])

    def reset(self) -> None:
        """The controllers are restarted, and hold the arm where it is."""
        self.seen["reset"] += 1
        self.course = None
        for follower in self.followers:
            follower.hold(self.t_ns, self.measured.position[follower.columns])

    def jump(self) -> None:
        before_ns = self.now_ns
        self.offset_ns += int(self.rng.choice([-1, 1]) * self.rng.uniform(0.01, 9) * NS)
        self.seen["jumped"] += 1
        self.bring_to_rest(before_ns)

    def send(self, trajectory: Trajectory, starts: Any, start: Point) -> None:
        self.course = Course.follow(trajectory, start, self.now_ns, self.course, starts)
        self.seen["sent"] += 1
        assert trajectory.times[0] > 0
        for group, follower in zip(self.arm.robot.action_groups, self.followers, strict=True):
            self.take_up(follower, message(trajectory.select(tuple(group.joints))))

    def take_up(self, follower: Follower, command: SimpleNamespace) -> None:
        jitter_ns = int(self.rng.integers(JITTER_NS - follower.cycle_ns))
        now_ns = self.t_ns + follower.latency_ns + jitter_ns
        last_ns = now_ns - follower.cycle_ns
        velocity = self.measured.velocity[follower.columns]
        position = self.measured.position[follower.columns] + velocity * ((now_ns - self.t_ns) / NS)
        follower.controller.update(last_ns, position, velocity)
        before = follower.state(last_ns) if self.from_desired else Point(now_ns, position, velocity)
        rejection = follower.controller.receive(command, now_ns)
        assert not isinstance(rejection, Rejection), rejection
        times_ns = np.array([p.time_from_start.sec * NS + p.time_from_start.nanosec for p in command.points])
        assert times_ns[0] > 0  # nothing in the past
        follower.stamps = np.concatenate([[before.time_ns], now_ns + times_ns])
        follower.positions = np.vstack([before.position, *(point.positions for point in command.points)])
        follower.velocities = np.vstack([before.velocity, *(point.velocities for point in command.points)])
        self.judge(follower)
        later = sorted(self.rng.integers(now_ns, now_ns + LATENCY_NS // 2, 2)) if self.rng.random() < 0.2 else []
        for t_ns in map(int, [now_ns, *later]):
            got, expected = follower.controller.update(t_ns, position, velocity), follower.state(t_ns)
            np.testing.assert_allclose(got[0], expected.position, atol=1e-9)
            np.testing.assert_allclose(got[1], expected.velocity, atol=1e-7)

    def judge(self, follower: Follower) -> None:
        """Every instant of the way that the controller is now on."""
        arm, columns = self.arm, follower.columns
        lowest, highest, fastest = extremes(follower.stamps, follower.positions, follower.velocities)
        for name, excess in (
            ("below its limit", arm.lower[columns] - lowest),
            ("above its limit", highest - arm.upper[columns]),
            ("faster than its limit", fastest - arm.velocity[columns]),
        ):
            assert (excess <= TOLERANCE).all(), f"{excess.max()} {name}"


def run(batch: int, sequences: int) -> Counter[str]:
    """The sequences of a batch; what they met, by name. AssertionError names the first that was not safe."""
    rng = np.random.default_rng(batch)
    seen: Counter[str] = Counter()
    arms = [Arm.of(random_robot(rng)) for _ in range(40)]
    for number in range(sequences):
        try:
            Sequence(arms[number % len(arms)], rng, seen).run()
        except AssertionError as error:
            raise AssertionError(f"sequence {number} of batch {batch}: {error}") from error
    return seen


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_message_is_taken_and_every_instant_is_safe(batch: int) -> None:
    seen = run(batch, SEQUENCES // BATCHES)
    assert seen["sequences"] == SEQUENCES // BATCHES
    # What the sequences are there for has happened, and often.
    assert seen["ACCEPTED"] >= 400, seen
    for name in ("stopped", "jumped", "reset", "blended", "clamped", "POSITION_LIMIT", "VELOCITY_LIMIT", "TOO_OLD"):
        assert seen[name] >= 50, f"{name}: {seen}"
    for name in ("NOT_FINITE", "JOINT_NAMES", "ACCELERATION_LIMIT", "START_TOO_FAR"):
        assert seen[name] >= 5, f"{name}: {seen}"


def thrown(joints: Any, start: Point, limits: dict[str, JointLimits], starts: Any) -> Trajectory:
    """A stop that knows no position limits."""
    return real_stop(joints, start, {name: replace(limit, lower=-99.0, upper=99.0) for name, limit in limits.items()})


def first_start(sequence: Sequence, all_starts: Any = Sequence.starts) -> list[Point]:
    """What the trajectory is planned from, without the other states that a controller may begin in."""
    return all_starts(sequence)[:1]


def moving(*arguments: Any) -> Trajectory:
    """A plan whose end still moves."""
    trajectory = plan(*arguments)
    assert trajectory.velocities is not None
    trajectory.velocities[-1] = 1e-3
    return trajectory


@pytest.mark.parametrize(
    ("target", "name", "sabotage", "words"),
    [
        (Gate, "_check_spline", lambda *_: None, "its limit"),
        (Gate, "_check_finite", lambda *_: None, "its limit"),
        (Sequence, "starts", first_start, "its limit"),
        (sys.modules[__name__], "stop", thrown, "its limit"),
        (gate, "plan", moving, "nonzero_end_velocity"),
    ],
    ids=["no_spline", "no_finite", "one_start", "stop", "end"],
)
def test_sabotage_is_found(target: Any, name: str, sabotage: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequences can fail: what keeps the arm safe is missed when it is taken away."""
    monkeypatch.setattr(target, name, sabotage)
    with np.errstate(all="ignore"), pytest.raises(AssertionError, match=words):
        run(0, SEQUENCES // BATCHES)
