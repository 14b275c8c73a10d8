"""Record the expert: `python -m dit_policy_ros.sim.record --output=DIR --episodes=150 --seed=1000`.

Writes one rosbag2 bag (mcap) an episode, with what `ros2 bag record` of the simulated robot's topics would hold: header
stamps are when a thing was measured, receive times come a random moment later, and messages stand in the order received.
Cameras do not fire together, joint states name the joints in an order of their own, and the instruction comes once.
"""

import argparse
import multiprocessing
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from dit_policy_ros.runtime.trajectory import Point, Trajectory, interpolate
from dit_policy_ros.sim import task, topics
from dit_policy_ros.sim.expert import PERIOD, Expert
from dit_policy_ros.sim.kinematics import Kinematics
from dit_policy_ros.sim.scene import ARM_JOINTS, COLOURS
from dit_policy_ros.sim.simulation import Simulation

EPOCH_NS = 1_750_000_000_000_000_000  # when the first episode begins; the others follow EPISODE_NS apart
EPISODE_NS = 60_000_000_000
LEAD_IN, TAIL = 0.3, 0.3  # s of an arm at rest, before the first command and after the last
CONTROL_RATE = 100  # Hz, of the controller that moves the servos' targets
DISTURBANCE = 0.008  # rad; each episode draws its own amplitude, up to this
# Mean of the exponential part of a message's way to the recorder, after a constant part, by topic (s).
DELAYS = {
    topics.WORKSPACE_IMAGE: (0.004, 0.003),
    topics.WRIST_IMAGE: (0.006, 0.003),
    topics.JOINT_STATES: (0.0003, 0.0007),
    topics.ARM_TRAJECTORY: (0.0003, 0.0007),
    topics.INSTRUCTION: (0.0003, 0.0007),
}
TYPES = {
    topics.WORKSPACE_IMAGE: "sensor_msgs/msg/Image",
    topics.WRIST_IMAGE: "sensor_msgs/msg/CompressedImage",
    topics.JOINT_STATES: "sensor_msgs/msg/JointState",
    topics.ARM_TRAJECTORY: "trajectory_msgs/msg/JointTrajectory",
    topics.INSTRUCTION: "std_msgs/msg/String",
}
POINT_TYPE = "trajectory_msgs/msg/JointTrajectoryPoint"
STORE = get_typestore(Stores.ROS2_JAZZY)


@dataclass(frozen=True)
class Recorded:
    """One message: when the recorder got it (ns), on which topic, and its serialised bytes."""

    received_ns: int
    topic: str
    data: bytes


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt. failure: why it was not kept, None if it was."""

    index: int
    colour: str
    duration: float
    failure: str | None


@dataclass
class Recorder:
    """Keeps an episode's messages. epoch_ns: of the episode's time zero; rng: of the messages' delays."""

    epoch_ns: int
    rng: np.random.Generator
    messages: list[Recorded] = field(default_factory=list)

    def add(self, topic: str, stamp_ns: int, fields: dict[str, Any], frame: str | None = "") -> None:
        """A message of something that happened at `stamp_ns` of the episode; frame None: it has no header."""
        stamp_ns += self.epoch_ns
        if frame is not None:
            fields = {"header": _header(stamp_ns, frame), **fields}
        kind = TYPES[topic]
        data = bytes(STORE.serialize_cdr(STORE.types[kind](**fields), kind))
        constant, mean = DELAYS[topic]
        received_ns = stamp_ns + round(1e9 * (constant + self.rng.exponential(mean)))
        self.messages.append(Recorded(received_ns, topic, data))

    def write(self, path: Path) -> None:
        """Write a bag at `path`, the messages as they were received."""
        writer = Writer(path, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
        writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        with writer:
            connections = {
                topic: writer.add_connection(f"/{topic}", kind, typestore=STORE, offered_qos_profiles=[_qos(topic)])
                for topic, kind in TYPES.items()
            }
            for message in sorted(self.messages, key=lambda m: m.received_ns):
                writer.write(connections[message.topic], message.received_ns, message.data)


def record_episode(
    simulation: Simulation, colour: str, seed: int, disturbance: float, recorder: Recorder
) -> str | None:
    """Let the expert push the block of that colour, telling all of it to `recorder`; why it failed, or None."""
    rng = np.random.default_rng([seed, 1])
    simulation.reset(seed)
    simulation.set_disturbance(disturbance * rng.uniform(), seed)
    start = simulation.blocks()
    recorder.add(topics.INSTRUCTION, 0, {"data": task.instruction_for(colour)}, frame=None)
    robot = _Robot(simulation, recorder, rng)
    expert = Expert(Kinematics(simulation.model), colour)
    robot.run(LEAD_IN)
    while (trajectory := expert.command(robot.arm, simulation.blocks())) is not None:
        if simulation.time_ns > task.TIME_LIMIT * 1e9:
            return f"not done after {task.TIME_LIMIT} s"
        robot.command(trajectory)
        robot.run(PERIOD)
    robot.run(TAIL)
    result = task.judge(colour, start, simulation.blocks())
    if result.success:
        return None
    return "another block was disturbed" if result.wrong_block else "the block is not over the line"


class _Robot:
    """The simulated robot in its own time: its controller follows the last command, its sensors speak at their rates."""

    def __init__(self, simulation: Simulation, recorder: Recorder, rng: np.random.Generator) -> None:
        self._simulation = simulation
        self._recorder = recorder
        self._order = topics.shuffled_joints(rng, simulation.joint_names)
        self._arm = [simulation.joint_names.index(name) for name in ARM_JOINTS]
        self._joint_period = round(1 / topics.JOINT_RATE / simulation.timestep)
        self._shutter = {camera: float(rng.uniform(0, 1 / topics.CAMERA_RATE)) for camera in topics.FRAMES}
        self._knots = [Point(0, self.arm, np.zeros(len(self._arm)))]

    @property
    def arm(self) -> np.ndarray:
        """(7,) the arm's measured joints, rad."""
        return self._simulation.q[self._arm]

    def command(self, trajectory: Trajectory) -> None:
        """Follow this from now on, from where the last command has led by now; and record it."""
        now = self._simulation.time_ns
        assert trajectory.velocities is not None
        rows = zip(trajectory.times, trajectory.positions, trajectory.velocities, strict=True)
        self._knots = [self._reference(now), *(Point(now + round(t * 1e9), q, qd) for t, q, qd in rows)]
        self._recorder.add(topics.ARM_TRAJECTORY, now, _trajectory_fields(trajectory))

    def run(self, duration: float) -> None:
        """Let time pass, in steps of the physics."""
        simulation = self._simulation
        for _ in range(round(duration / simulation.timestep)):
            now = simulation.time_ns
            step = round(now * 1e-9 / simulation.timestep)
            if step % self._joint_period == 0:
                simulation.set_targets(ARM_JOINTS, self._reference(now).position)
                state = (self._order, simulation.joint_names, simulation.q, simulation.qd)
                self._recorder.add(topics.JOINT_STATES, now, topics.joint_state_fields(*state))
            self._photograph(now)
            simulation.step(simulation.timestep)

    def _photograph(self, now: int) -> None:
        for camera, due in self._shutter.items():
            if now * 1e-9 >= due:
                self._shutter[camera] += 1 / topics.CAMERA_RATE
                rgb = self._simulation.render(camera)
                if camera == "wrist":
                    self._recorder.add(
                        topics.WRIST_IMAGE, now, topics.compressed_image_fields(rgb), topics.FRAMES[camera]
                    )
                else:
                    self._recorder.add(topics.WORKSPACE_IMAGE, now, topics.image_fields(rgb), topics.FRAMES[camera])

    def _reference(self, now: int) -> Point:
        for start, end in pairwise(self._knots):
            if now <= end.time_ns:
                return interpolate(start, end, now)
        return Point(now, self._knots[-1].position, np.zeros(len(self._arm)))


def _header(stamp_ns: int, frame: str) -> Any:
    return STORE.types["std_msgs/msg/Header"](stamp=_time(stamp_ns), frame_id=frame)


def _time(ns: int) -> Any:
    seconds, nanoseconds = divmod(ns, 1_000_000_000)
    return STORE.types["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)


def _trajectory_fields(trajectory: Trajectory) -> dict[str, Any]:
    point, duration = (STORE.types[kind] for kind in (POINT_TYPE, "builtin_interfaces/msg/Duration"))
    assert trajectory.velocities is not None
    none = np.array([])
    points = []
    for t, position, velocity in zip(trajectory.times, trajectory.positions, trajectory.velocities, strict=True):
        seconds, nanoseconds = divmod(round(t * 1e9), 1_000_000_000)
        since = duration(sec=seconds, nanosec=nanoseconds)
        points.append(
            point(positions=position, velocities=velocity, accelerations=none, effort=none, time_from_start=since)
        )
    return {"joint_names": list(trajectory.joint_names), "points": points}


def _qos(topic: str) -> Qos:
    """What the robot's publishers offer: images best effort, the rest reliable, the instruction kept for latecomers."""
    images = topic in (topics.WORKSPACE_IMAGE, topics.WRIST_IMAGE)
    forever = QosTime(9223372036, 854775807)
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=5 if images else 1 if topic == topics.INSTRUCTION else 10,
        reliability=QosReliability.BEST_EFFORT if images else QosReliability.RELIABLE,
        durability=QosDurability.TRANSIENT_LOCAL if topic == topics.INSTRUCTION else QosDurability.VOLATILE,
        deadline=forever,
        lifespan=forever,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=forever,
        avoid_ros_namespace_conventions=False,
    )


_simulation: Simulation | None = None  # a worker process's own, made once


def _attempt(output: Path, index: int, seed: int, disturbance: float) -> Outcome:
    """Record and, if it succeeded, write episode `index`; what a worker process does."""
    global _simulation
    _simulation = _simulation or Simulation()
    colour = COLOURS[index % len(COLOURS)]
    recorder = Recorder(EPOCH_NS + index * EPISODE_NS, np.random.default_rng([seed + index, 2]))
    failure = record_episode(_simulation, colour, seed + index, disturbance, recorder)
    if failure is None:
        recorder.write(output / f"episode_{index:03d}")
    return Outcome(index, colour, _simulation.time_ns * 1e-9, failure)


def record(
    output: Path, episodes: int, seed: int, disturbance: float = DISTURBANCE, workers: int = 2
) -> Iterator[Outcome]:
    """Attempt `episodes` episodes in `workers` processes, colours in turn; outcomes as they come.

    Episode i depends on seed + i alone. Failed ones leave no bag.
    """
    output.mkdir(parents=True, exist_ok=True)
    # Spawned: a forked process would inherit the rendering context of its parent, and OpenCV's threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_attempt, output, i, seed, disturbance) for i in range(episodes)]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _make_room(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise SystemExit(f"--output={output} is a file; expected a folder to write bags into")
    there = sorted(output.iterdir()) if output.is_dir() else []
    if there and not overwrite:
        raise SystemExit(
            f"--output={output} is not empty (it has {there[0].name}, {len(there)} in all); "
            "choose another folder, or say --overwrite to replace the episodes there"
        )
    for old in output.glob("episode_*"):
        shutil.rmtree(old)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 if at least one episode was kept."""
    parser = argparse.ArgumentParser(description="Record the scripted expert into rosbag2 bags, one an episode.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the bags, new or empty")
    parser.add_argument("--episodes", type=int, default=150, help="attempts; the few that fail are not kept")
    parser.add_argument("--seed", type=int, default=1000, help="of the first episode; the next has the next")
    parser.add_argument("--disturbance", type=float, default=DISTURBANCE, help="at most this much, rad")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace the episodes in the output folder")
    options = parser.parse_args(arguments)
    _make_room(options.output, options.overwrite)
    began = time.monotonic()
    columns = (TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    outcomes = []
    with Progress(*columns) as progress:
        bar = progress.add_task("recording", total=options.episodes)
        for outcome in record(options.output, options.episodes, options.seed, options.disturbance, options.workers):
            outcomes.append(outcome)
            progress.advance(bar)
            if outcome.failure:
                progress.print(f"episode {outcome.index} ({outcome.colour}) not kept: {outcome.failure}")
    kept = [outcome for outcome in outcomes if outcome.failure is None]
    colours = Counter(outcome.colour for outcome in kept)
    print(
        f"kept {len(kept)} of {len(outcomes)} episodes ({', '.join(f'{n} {c}' for c, n in sorted(colours.items()))}), "
        f"{sum(o.duration for o in kept):.0f} s of robot time, in {time.monotonic() - began:.0f} s: {options.output}"
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
