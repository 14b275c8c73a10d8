"""The simulated arm as a ROS node: cameras, joint states and trajectory controllers, as a robot would have them.

Design. The main thread owns the simulation, since an OpenGL context belongs to the thread that made it: each tick it
obeys the commands queued, publishes what is measured, lets the controllers set the joints' targets, and steps the
physics. Ticks keep to the steady clock. A second thread spins ROS, and its callbacks only queue.

Time. Stamps are the node's clock at the moment that the tick stands for. When the machine falls behind, ticks are
caught up in a burst, but never more than 0.1 s of them: beyond that the simulation gives the lost time up, warns, and
counts it in /diagnostics. With `publish_clock` stamps are the simulated time, which /clock tells everybody else.
"""

from __future__ import annotations

import array
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from dit_policy_msgs.msg import SceneState
from dit_policy_msgs.srv import ResetScene
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from rclpy.time import Time
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState

from dit_policy_ros.nodes.declaration import Declaration
from dit_policy_ros.nodes.pacing import Due, Pacer
from dit_policy_ros.nodes.sim_controllers import Commands, SimController
from dit_policy_ros.sim import topics
from dit_policy_ros.sim.scene import GRIPPER_JOINT, names
from dit_policy_ros.sim.simulation import OffscreenError, Simulation
from dit_policy_ros.sim.task import is_over_line

_NS = 1_000_000_000
_ANSWER_S = 5.0

DECLARATIONS: tuple[Declaration, ...] = (
    Declaration("model", "", "MJCF file to load in place of the built-in arm and blocks.", read_only=True),
    Declaration("seed", 0, "Seed of the first scene; the service reset_scene gives the next.", 0, 2**31 - 1, True),
    Declaration(
        "publish_clock",
        False,
        "Publish the simulated time on /clock and stamp with it; the other nodes then need use_sim_time.",
        read_only=True,
    ),
    Declaration(
        "joint_state_rate",
        float(topics.JOINT_RATE),
        "Rate of joint_states and of the controllers, Hz.",
        50.0,
        500.0,
        True,
    ),
    Declaration("camera_rate", float(topics.CAMERA_RATE), "Rate of both cameras, Hz.", 1.0, 60.0, True),
    Declaration("camera_size", 128, "Width and height of both cameras' images, pixels.", 16, 1024, True),
    Declaration("controller_state_rate", 50.0, "Rate of the controllers' state, Hz.", 1.0, 500.0, True),
    Declaration("scene_state_rate", 10.0, "Rate of scene_state, the truth about the blocks, Hz.", 1.0, 100.0, True),
    Declaration(
        "interpolate_from_desired_state",
        True,
        "The controllers start a new trajectory from their last reference, not from the measured joints: what chunked "
        "references need, since each chunk would otherwise pull the arm back by its tracking lag.",
        read_only=True,
    ),
    Declaration(
        "allow_partial_joints_goal", False, "The controllers accept trajectories of some joints only.", read_only=True
    ),
    Declaration("blank_images", False, "Publish black images: a control of what a policy goes by."),
)


class SimNode(Node):
    """`simulator`: parameters above, topics and services in `sim.topics`."""

    def __init__(self) -> None:
        super().__init__("simulator")
        for declaration in DECLARATIONS:
            self.declare_parameter(declaration.name, declaration.default, declaration.descriptor())
        self._seed = int(self._value("seed"))
        self._simulation = Simulation(self._value("model") or None, camera_size=self._value("camera_size"))
        self._simulation.reset(self._seed)
        self._start = self._simulation.blocks()
        self._simulated_ns = 0
        self._commands: Commands = queue.SimpleQueue()
        self._period_ns = self._period()
        self._pacer = Pacer(self._period_ns)
        self._make_controllers()
        self._make_publishers()
        self.create_service(ResetScene, topics.RESET_SCENE, self._serve_reset)

    def run(self, stop: threading.Event) -> None:
        """Simulate until `stop` is set; call it in the thread that made the node."""
        with self._simulation as simulation:
            for camera in self._cameras:
                simulation.render(camera)  # the first picture takes long; the clock has not started yet
            self._pacer = Pacer(self._period_ns)
            while not stop.is_set():
                self._tick()
                simulation.step(self._period_ns / _NS)
                self._simulated_ns += self._period_ns
                self._complain_of(self._pacer.next(stop.wait))

    def _complain_of(self, lost_ns: int) -> None:
        if lost_ns:
            self.get_logger().warning(
                f"the simulation fell behind and gave up {lost_ns / _NS:.2f} s: this machine is too busy for it",
                throttle_duration_sec=5.0,
            )

    def _period(self) -> int:
        """The loop's period, ns."""
        rate, step = self._value("joint_state_rate"), self._simulation.timestep
        steps = 1 / rate / step
        if abs(steps - round(steps)) > 1e-6:
            raise ValueError(f"joint_state_rate {rate} Hz is no whole number of physics steps of {step} s; try 100.0")
        return round(_NS / rate)

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _make_controllers(self) -> None:
        arm = [joint for joint in self._simulation.joint_names if joint != GRIPPER_JOINT]
        groups = {topics.ARM_CONTROLLER: arm}
        if GRIPPER_JOINT in self._simulation.joint_names:
            groups[topics.GRIPPER_CONTROLLER] = [GRIPPER_JOINT]
        self._controllers = [
            SimController(self, self._simulation, name, joints, self._commands) for name, joints in groups.items()
        ]

    def _make_publishers(self) -> None:
        rng = np.random.default_rng(self._seed)
        self._order = topics.shuffled_joints(rng, self._simulation.joint_names)
        ticks = self._value("joint_state_rate")
        self._clock_topic = self.create_publisher(Clock, "/clock", 10) if self._value("publish_clock") else None
        self._joint_states = self.create_publisher(JointState, topics.JOINT_STATES, 10)
        self._scene_state = self.create_publisher(SceneState, topics.SCENE_STATE, 10)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._scene_due = Due(self._value("scene_state_rate"), ticks)
        self._controllers_due = Due(self._value("controller_state_rate"), ticks)
        self._diagnostics_due = Due(1.0, ticks)
        kinds = {"workspace": (Image, topics.WORKSPACE_IMAGE), "wrist": (CompressedImage, topics.WRIST_IMAGE)}
        self._cameras = {}
        for camera, (kind, topic) in kinds.items():
            if camera not in names(self._simulation.model, "camera"):
                self.get_logger().warning(f"the model has no camera {camera!r}: nothing is published on {topic}")
                continue
            publisher = self.create_publisher(kind, topic, qos_profile_sensor_data)
            # Two cameras of a robot do not fire together.
            self._cameras[camera] = publisher, Due(self._value("camera_rate"), ticks, rng.uniform())

    # --- the spinning thread: only queues ---

    def _serve_reset(self, request: ResetScene.Request, response: ResetScene.Response) -> ResetScene.Response:
        done: Future[None] = Future()
        self._commands.put(lambda _: self._reset(request.seed, done))
        try:
            done.result(_ANSWER_S)
            response.success = True
        except TimeoutError:
            response.message = f"the simulation did not come to it within {_ANSWER_S} s"
        return response

    # --- the simulating thread ---

    def _reset(self, seed: int, done: Future[None]) -> None:
        self._simulation.reset(seed)
        self._seed, self._start = seed, self._simulation.blocks()
        for controller in self._controllers:
            controller.reset("the scene was reset")
        done.set_result(None)

    def _tick(self) -> None:
        stamp_ns = self._stamp_ns()
        stamp = Time(nanoseconds=stamp_ns).to_msg()
        if self._clock_topic is not None:
            self._clock_topic.publish(Clock(clock=stamp))
        while not self._commands.empty():
            self._commands.get()(stamp_ns)
        self._publish_joints(stamp)
        for controller in self._controllers:
            controller.update(stamp_ns)
        if self._controllers_due():
            for controller in self._controllers:
                controller.publish(stamp)
        if self._scene_due():
            self._publish_scene(stamp)
        for camera, (_, due) in self._cameras.items():
            if due():
                self._publish_image(camera, stamp)
        if self._diagnostics_due():
            self._publish_diagnostics(stamp)

    def _stamp_ns(self) -> int:
        if self._clock_topic is not None:
            return self._simulated_ns
        return int(self.get_clock().now().nanoseconds) - self._pacer.lag_ns

    def _publish_joints(self, stamp: object) -> None:
        simulation = self._simulation
        fields = topics.joint_state_fields(self._order, simulation.joint_names, simulation.q, simulation.qd)
        self._joint_states.publish(_message(JointState, stamp, "", fields))

    def _publish_scene(self, stamp: object) -> None:
        blocks = self._simulation.blocks()
        x, y, yaw = ([place[axis] for place in blocks.values()] for axis in range(3))
        moved = [float(np.hypot(px - self._start[c][0], py - self._start[c][1])) for c, (px, py, _) in blocks.items()]
        fields = {"seed": self._seed, "blocks": list(blocks), "x": x, "y": y, "yaw": yaw, "displacement": moved}
        fields["over_line"] = [is_over_line(place[0]) for place in blocks.values()]
        self._scene_state.publish(_message(SceneState, stamp, "world", fields))

    def _publish_image(self, camera: str, stamp: object) -> None:
        publisher, _ = self._cameras[camera]
        rgb = self._simulation.render(camera)
        if self._value("blank_images"):
            rgb = np.zeros_like(rgb)
        fields = topics.image_fields(rgb) if publisher.msg_type is Image else topics.compressed_image_fields(rgb)
        publisher.publish(_message(publisher.msg_type, stamp, topics.FRAMES[camera], fields))

    def _publish_diagnostics(self, stamp: object) -> None:
        lost = self._pacer.lost_ns / _NS
        status = DiagnosticStatus(
            level=DiagnosticStatus.WARN if lost else DiagnosticStatus.OK,
            name=self.get_fully_qualified_name(),
            message="fell behind real time" if lost else "in real time",
            hardware_id="simulation",
            values=[KeyValue(key="lost_s", value=f"{lost:.3f}"), KeyValue(key="seed", value=str(self._seed))],
        )
        self._diagnostics.publish(_message(DiagnosticArray, stamp, "", {"status": [status]}))


def _message(kind: type, stamp: object, frame: str, fields: dict[str, Any]) -> Any:
    # rclpy takes an array.array as it is, a numpy array element by element (2 ms for a small image).
    message = kind(
        **{
            name: array.array(value.dtype.char, value.tobytes()) if isinstance(value, np.ndarray) else value
            for name, value in fields.items()
        }
    )
    message.header.stamp = stamp
    message.header.frame_id = frame
    return message


def _spin(executor: SingleThreadedExecutor) -> None:
    with suppress(ExternalShutdownException):
        executor.spin()


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of `ros2 run dit_policy_ros sim_node`: 0 after SIGINT or SIGTERM, 1 if it cannot start."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = SimNode()
    except (OSError, ValueError, OffscreenError) as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinner = threading.Thread(target=_spin, args=(executor,), name="ros")
    spinner.start()
    try:
        node.run(stop)
    except OffscreenError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    finally:
        executor.shutdown()
        rclpy.shutdown()
        spinner.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
