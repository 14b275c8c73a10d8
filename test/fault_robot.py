"""A robot made of topics whose arm moves: a trajectory controller at 100 Hz, cameras, joint states, all spoilable.

For test/faults.py. It publishes over real DDS, keeps every command with the arm's state at that moment, and every word
of the policy node and the guard, each with the time it came (s, CLOCK_MONOTONIC).
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from dit_policy_msgs.msg import ActionChunk, PolicyStatus, TrajectoryControllerState
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from dit_policy_ros.embodiment import Camera, Embodiment
from dit_policy_ros.nodes.conversions import time_message
from dit_policy_ros.runtime.trajectory import Point
from dit_policy_ros.sim.trajectory_controller import TrajectoryController

HOME = np.array([0.0, -0.4, 0.0, -1.8, 0.0, 1.6, 0.8])
CYCLE_S = 0.01
FRAME_S = 1 / 15
LAG_S = 0.02  # of the arm behind its reference
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@dataclass(frozen=True)
class Command:
    """A JointTrajectory that came at `at` (s), with what the controller and the arm did then.

    heard: whether there was a controller to hear it.
    """

    at: float
    now_ns: int
    message: JointTrajectory
    reference: Point
    measured: Point
    heard: bool = True


@dataclass(frozen=True)
class Heard:
    """A message of the node or the guard, and when it came (s)."""

    at: float
    message: Any


class FaultRobot:
    """Spoil it by its fields; `mend` puts them in order. With `simulated`, it keeps the time, on /clock.

    The controller goes by a clock of its own, as hardware does, so that a jump of the time does not move the arm.
    """

    def __init__(self, embodiment: Embodiment, simulated: bool = False) -> None:
        self.embodiment = embodiment
        self._simulated = simulated
        self.mend()
        self.clock_offset_ns = 0
        self.commands: list[Command] = []
        self.chunks: list[Heard] = []
        self.statuses: list[Heard] = []
        self.diagnostics: list[Heard] = []  # DiagnosticStatus, one each
        self.motion: list[tuple[float, float]] = []  # time (s) and the fastest joint's speed (rad/s), each cycle
        self.late_cycles = 0
        self._arm = TrajectoryController(embodiment.action_joints, interpolate_from_desired_state=True)
        self._position, self._velocity = HOME.copy(), np.zeros(len(HOME))
        self._reference = Point(0, HOME, np.zeros(len(HOME)))
        self._frames = {camera.name: _frame(camera) for camera in embodiment.cameras}
        self._context = Context()
        rclpy.init(context=self._context)
        self.node = Node("robot", context=self._context)
        # Under this name it is no controller to the node's eyes, so that the controller can die and this goes on.
        self._recorder = Node("rosbag2_recorder", context=self._context)
        self._connect()
        self._executor = SingleThreadedExecutor(context=self._context)
        for node in (self.node, self._recorder):
            self._executor.add_node(node)
        self._running = True
        loops: tuple[Callable[[], None], ...] = (self._spin, self._move, self._film)
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def _connect(self) -> None:
        embodiment, node = self.embodiment, self.node
        self._images = {
            camera.name: node.create_publisher(
                Image if camera.transport == "raw" else CompressedImage, camera.topic, qos_profile_sensor_data
            )
            for camera in embodiment.cameras
        }
        self._joint_states = node.create_publisher(JointState, embodiment.state.topic, qos_profile_sensor_data)
        self._instruction = node.create_publisher(String, embodiment.instruction_topic, LATCHED)
        self._clock = node.create_publisher(Clock, "/clock", qos_profile_sensor_data) if self._simulated else None
        self._topic = embodiment.action_groups[0].topic
        self.intruder = node.create_publisher(JointTrajectory, self._topic, 10)
        self._controller: Any = None
        self.start_controller()
        self._recorder.create_subscription(JointTrajectory, self._topic, self._record, 50)
        for kind, topic, heard in (
            (ActionChunk, "dit_policy/action_chunk", self.chunks),
            (PolicyStatus, "dit_policy/status", self.statuses),
        ):
            self._recorder.create_subscription(kind, topic, _keeper(heard), 50)
        self._recorder.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)

    def mend(self) -> None:
        """All inputs in order."""
        self.silent: set[str] = set()  # names of cameras, or "state"
        self.frozen: set[str] = set()  # cameras that repeat their last image, stamp and all
        self.spoilt: dict[str, Callable[[Any], None]] = {}  # by camera or "state": what is done to each message

    def close(self) -> None:
        self._running = False
        for thread in self._threads:
            thread.join()
        for node in (self.node, self._recorder):
            node.destroy_node()
        rclpy.shutdown(context=self._context)

    # --- time --------------------------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        return time.time_ns() + self.clock_offset_ns

    # --- the controller ----------------------------------------------------------------------------------------------

    def kill_controller(self) -> None:
        """It neither listens nor reports, and the arm's brakes hold it."""
        controller, self._controller = self._controller, None
        self.node.destroy_subscription(controller[0])
        self.node.destroy_publisher(controller[1])
        self._arm.reset()

    def start_controller(self) -> None:
        """It holds the arm where it is until a command comes."""
        subscription = self.node.create_subscription(
            JointTrajectory, self._topic, lambda message: self._arm.receive(message, time.monotonic_ns()), 50
        )
        states = self.node.create_publisher(
            TrajectoryControllerState,
            self._topic.replace("joint_trajectory", "controller_state"),
            qos_profile_sensor_data,
        )
        self._controller = (subscription, states)

    # --- what it hears -----------------------------------------------------------------------------------------------

    def _record(self, message: JointTrajectory) -> None:
        now_ns = self.now_ns()
        measured = Point(now_ns, self._position.copy(), self._velocity.copy())
        heard = self._controller is not None
        self.commands.append(Command(time.monotonic(), now_ns, message, self._reference, measured, heard))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        at = time.monotonic()
        self.diagnostics += [Heard(at, status) for status in message.status]

    @property
    def status(self) -> PolicyStatus | None:
        """The node's newest."""
        return self.statuses[-1].message if self.statuses else None

    # --- what it says ------------------------------------------------------------------------------------------------

    def instruct(self, text: str) -> None:
        self._instruction.publish(String(data=text))

    @property
    def position(self) -> np.ndarray:
        """Measured, rad (7,)."""
        return self._position.copy()

    @property
    def speed(self) -> float:
        """Of the fastest joint, rad/s."""
        return self.motion[-1][1] if self.motion else 0.0

    def _spin(self) -> None:
        while self._running:
            self._executor.spin_once(timeout_sec=0.05)

    def _move(self) -> None:
        due = time.monotonic()
        while self._running:
            due += CYCLE_S
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            else:
                self.late_cycles += wait < -CYCLE_S
                due -= wait
            self._cycle()

    def _cycle(self) -> None:
        now_ns = self.now_ns()
        if self._clock is not None:
            self._clock.publish(Clock(clock=time_message(now_ns)))
        controller = self._controller
        if controller is None:
            reference = Point(now_ns, self._position, np.zeros(len(HOME)))
        else:
            position, velocity, _ = self._arm.update(time.monotonic_ns(), self._position, self._velocity)
            reference = Point(now_ns, position, velocity)
        before = self._position
        self._position = before + (reference.position - before) * (1 - np.exp(-CYCLE_S / LAG_S))
        self._velocity = (self._position - before) / CYCLE_S
        self._reference = reference
        self.motion.append((time.monotonic(), float(np.abs(self._velocity).max())))
        self._publish_joints(now_ns)
        if controller is not None:
            self._publish_controller_state(controller[1], reference, now_ns)

    def _publish_joints(self, now_ns: int) -> None:
        if "state" in self.silent:
            return
        names = [*reversed(self.embodiment.action_joints), "panda_finger_joint1"]
        message = JointState(
            name=names, position=[*self._position[::-1].tolist(), 0.04], velocity=[*self._velocity[::-1].tolist(), 0.0]
        )
        message.header.stamp = time_message(now_ns)
        self.spoilt.get("state", lambda _: None)(message)
        self._joint_states.publish(message)

    def _publish_controller_state(self, publisher: Any, reference: Point, now_ns: int) -> None:
        def point(values: np.ndarray) -> JointTrajectoryPoint:
            return JointTrajectoryPoint(positions=values.tolist())

        message = TrajectoryControllerState(joint_names=list(self.embodiment.action_joints))
        message.header.stamp = time_message(now_ns)
        message.reference, message.feedback = point(reference.position), point(self._position)
        message.error = point(reference.position - self._position)
        publisher.publish(message)

    def _film(self) -> None:
        due = time.monotonic()
        while self._running:
            due += FRAME_S
            time.sleep(max(0.0, due - time.monotonic()))
            for camera in self.embodiment.cameras:
                if camera.name in self.silent:
                    continue
                message = self._frames[camera.name]
                if camera.name not in self.frozen:
                    message.header.stamp = time_message(self.now_ns())
                spoil = self.spoilt.get(camera.name)
                if spoil is not None:
                    message = copy.copy(message)
                    spoil(message)
                self._images[camera.name].publish(message)


def _keeper(heard: list[Heard]) -> Callable[[Any], None]:
    return lambda message: heard.append(Heard(time.monotonic(), message))


def _frame(camera: Camera) -> Any:
    """A picture that is the same each time: what is in it makes no difference here."""
    picture = np.full((camera.height, camera.width, 3), 90, dtype=np.uint8)
    if camera.transport == "raw":
        message = Image(height=camera.height, width=camera.width, encoding="rgb8", step=3 * camera.width)
        message.data = picture.tobytes()
        return message
    return CompressedImage(format="jpeg", data=jpeg(camera.width, camera.height))


def jpeg(width: int, height: int) -> bytes:
    """A grey picture as a JPEG file."""
    return cv2.imencode(".jpg", np.full((height, width, 3), 90, dtype=np.uint8))[1].tobytes()
