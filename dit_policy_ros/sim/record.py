"""Record the expert: `python -m dit_policy_ros.sim.record --output=DIR --episodes=150 --seed=1000`.

Writes one rosbag2 bag (mcap) an episode, with what `ros2 bag record` of the simulated robot's topics would hold:
header stamps are when a thing was measured, receive times come a random moment later, and messages stand in the order
received. Cameras do not fire together, joint states name the joints in an order of their own for each episode, and the
instruction comes once.
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
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from dit_policy_ros.runtime.trajectory import Trajectory
from dit_policy_ros.sim import task, topics
from dit_policy_ros.sim.expert import PERIOD, Expert
from dit_policy_ros.sim.kinematics import Kinematics
from dit_policy_ros.sim.scene import ARM_JOINTS, COLOURS
from dit_policy_ros.sim.simulation import Simulation
from dit_policy_ros.sim.trajectory_controller import TrajectoryController

EPOCH_NS = 1_750_000_000_000_000_000  # when the first episode begins; the others follow EPISODE_NS apart
EPISODE_NS = 60_000_000_000
LEAD_IN, TAIL = 0.3, 0.3  # s of an arm at rest, before the first command and after the last
CONTROL_RATE = 100  # Hz, of the controller that moves the servos' targets
DISTURBANCE = 0.008  # rad; each episode draws its own amplitude, up to this
# How long a message is on its way to the recorder, by topic: a constant, and the mean of an exponential part, s.
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
    """Keeps an episode's messages until they are written; rng: of their delays on the way here."""

    rng: np.random.Generator
    messages: list[Recorded] = field(default_factory=list)

    def add(self, topic: str, sent_ns: int, message: Any) -> None:
        """Receive, a moment after `sent_ns`, what was sent then."""
        constant, mean = DELAYS[topic]
        received_ns = sent_ns + round(1e9 * (constant + self.rng.exponential(mean)))
        self.messages.append(Recorded(received_ns, topic, bytes(STORE.serialize_cdr(message, TYPES[topic]))))

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
    simulation: Simulation, colour: str, seed: int, disturbance: float, recorder: Recorder, epoch_ns: int = EPOCH_NS
) -> str | None:
    """Let the expert push the block of that colour, telling all of it to `recorder`; why it failed, or None.

    disturbance: at most this much of it, rad; see `Simulation.set_disturbance`. epoch_ns: the clock at the start.
    """
    rng = np.random.default_rng([seed, 1])
    simulation.reset(seed)
    simulation.set_disturbance(disturbance * rng.uniform(), seed)
    start = simulation.blocks()
    robot = _Robot(simulation, recorder, rng, epoch_ns)
    recorder.add(topics.INSTRUCTION, epoch_ns, _message("std_msgs/msg/String", data=task.instruction_for(colour)))
    expert = Expert(Kinematics(simulation.model), colour)
    robot.run(LEAD_IN)
    while (trajectory := expert.command(robot.arm, simulation.blocks())) is not None:
        if simulation.time_ns > task.TIME_LIMIT * 1e9:
            return f"not done after {task.TIME_LIMIT:.0f} s"
        robot.command(trajectory)
        robot.run(PERIOD)
    robot.run(TAIL)
    result = task.judge(colour, start, simulation.blocks())
    if result.success:
        return None
    return "another block was disturbed" if result.wrong_block else "the block is not over the line"


class _Robot:
    """The simulated robot in its own time: its controller follows commands, its sensors speak at their rates."""

    def __init__(self, simulation: Simulation, recorder: Recorder, rng: np.random.Generator, epoch_ns: int) -> None:
        self._simulation = simulation
        self._recorder = recorder
        self._epoch_ns = epoch_ns
        self._controller = TrajectoryController(ARM_JOINTS, interpolate_from_desired_state=True)
        self._order = topics.shuffled_joints(rng, simulation.joint_names)
        self._arm = [simulation.joint_names.index(name) for name in ARM_JOINTS]
        self._joint_period = round(1 / topics.JOINT_RATE / simulation.timestep)
        # Two cameras of a robot do not fire together.
        self._shutter = {camera: float(rng.uniform(0, 1 / topics.CAMERA_RATE)) for camera in topics.FRAMES}

    @property
    def arm(self) -> np.ndarray:
        """(7,) the arm's measured joints, rad."""
        return self._simulation.q[self._arm]

    def command(self, trajectory: Trajectory) -> None:
        """Send this to the controller, from now on; RuntimeError if it refuses."""
        message = _trajectory_message(trajectory, self._header())
        if rejection := self._controller.receive(message, self._now_ns):
            raise RuntimeError(f"the controller refused the expert's command: {rejection.reason}")
        self._recorder.add(topics.ARM_TRAJECTORY, self._now_ns, message)

    def run(self, duration: float) -> None:
        """Let time pass, in steps of the physics."""
        timestep = self._simulation.timestep
        for _ in range(round(duration / timestep)):
            elapsed = self._simulation.time_ns * 1e-9
            if round(elapsed / timestep) % self._joint_period == 0:
                self._control()
            for camera, due in self._shutter.items():
                if elapsed >= due:
                    self._shutter[camera] = due + 1 / topics.CAMERA_RATE
                    self._photograph(camera)
            self._simulation.step(timestep)

    @property
    def _now_ns(self) -> int:
        return self._epoch_ns + self._simulation.time_ns

    def _header(self, frame: str = "") -> Any:
        seconds, nanoseconds = divmod(self._now_ns, 1_000_000_000)
        stamp = _message("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
        return _message("std_msgs/msg/Header", stamp=stamp, frame_id=frame)

    def _control(self) -> None:
        simulation = self._simulation
        q, qd = simulation.q, simulation.qd
        reference, _, _ = self._controller.update(self._now_ns, q[self._arm], qd[self._arm])
        simulation.set_targets(ARM_JOINTS, reference)
        fields = topics.joint_state_fields(self._order, simulation.joint_names, q, qd)
        message = _message("sensor_msgs/msg/JointState", header=self._header(), **fields)
        self._recorder.add(topics.JOINT_STATES, self._now_ns, message)

    def _photograph(self, camera: str) -> None:
        topic = topics.IMAGES[camera]
        rgb = self._simulation.render(camera)
        compressed = TYPES[topic] == "sensor_msgs/msg/CompressedImage"
        fields = topics.compressed_image_fields(rgb) if compressed else topics.image_fields(rgb)
        message = _message(TYPES[topic], header=self._header(topics.FRAMES[camera]), **fields)
        self._recorder.add(topic, self._now_ns, message)


def _message(kind: str, **fields: Any) -> Any:
    return STORE.types[kind](**fields)


def _trajectory_message(trajectory: Trajectory, header: Any) -> Any:
    assert trajectory.velocities is not None
    none = np.array([])
    points = []
    for t, position, velocity in zip(trajectory.times, trajectory.positions, trajectory.velocities, strict=True):
        seconds, nanoseconds = divmod(round(t * 1e9), 1_000_000_000)
        since = _message("builtin_interfaces/msg/Duration", sec=seconds, nanosec=nanoseconds)
        fields = {"positions": position, "velocities": velocity, "accelerations": none, "effort": none}
        points.append(_message("trajectory_msgs/msg/JointTrajectoryPoint", **fields, time_from_start=since))
    names = list(trajectory.joint_names)
    return _message("trajectory_msgs/msg/JointTrajectory", header=header, joint_names=names, points=points)


def _qos(topic: str) -> Qos:
    """What the publishers offer: images best effort, the rest reliable, the instruction kept for latecomers."""
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
    recorder = Recorder(np.random.default_rng([seed + index, 2]))
    epoch_ns = EPOCH_NS + index * EPISODE_NS
    failure = record_episode(_simulation, colour, seed + index, disturbance, recorder, epoch_ns)
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
    job = record(options.output, options.episodes, options.seed, options.disturbance, options.workers)
    with Progress(*columns) as progress:
        bar = progress.add_task("recording", total=options.episodes)
        for outcome in job:
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
