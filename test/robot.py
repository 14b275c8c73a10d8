"""A robot made of topics, for tests of the policy node, over real DDS from another process than the node's.

It publishes what a robot would, lets a test spoil one thing at a time, and remembers what came back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import asking
import cv2
import numpy as np
import rclpy
from asking import ask
from dit_policy_msgs.action import ExecuteInstruction
from dit_policy_msgs.msg import ActionChunk, Heartbeat, PolicyStatus
from dit_policy_msgs.srv import SetInstruction
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Log
from rcl_interfaces.srv import GetParameters, ListParameters, SetParameters, SetParametersAtomically
from rclpy.action import ActionClient
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.embodiment import Embodiment

LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def wait_for(condition: Callable[[], object], what: str, timeout: float = 20.0) -> object:
    """The condition's value once it is true; an AssertionError that says what did not happen."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"within {timeout} s: {what}")


class Goal:
    """One goal of ~/execute_instruction, as a behaviour tree's node sees it."""

    def __init__(self, client: ActionClient, instruction: str, time_limit: int) -> None:
        self.feedback: list[ExecuteInstruction.Feedback] = []
        wait_for(client.server_is_ready, "the action's server appears")
        goal = ExecuteInstruction.Goal(instruction=instruction)
        goal.time_limit.sec = time_limit
        future = client.send_goal_async(goal, feedback_callback=lambda message: self.feedback.append(message.feedback))
        wait_for(future.done, "the goal is answered")
        self._handle = future.result()
        self.accepted = bool(self._handle.accepted)
        self._result = self._handle.get_result_async() if self.accepted else None

    def cancel(self) -> None:
        future = self._handle.cancel_goal_async()
        wait_for(future.done, "the cancelling is answered")
        assert future.result().goals_canceling

    def wait(self) -> tuple[int, ExecuteInstruction.Result]:
        """The goal's status (action_msgs/GoalStatus) and its result."""
        assert self._result is not None
        wait_for(self._result.done, "the goal ends")
        answer = self._result.result()
        return answer.status, answer.result


class Robot:
    """Joint states at 50 Hz and images at 20 Hz from a thread; the fields are read anew for each message."""

    def __init__(self, embodiment: Embodiment, namespace: str = "/") -> None:
        self.embodiment = embodiment
        self.mend()
        self.trajectories: list[JointTrajectory] = []
        self.chunks: list[ActionChunk] = []
        self.status: PolicyStatus | None = None
        self.heartbeats: list[Heartbeat] = []
        self.predicted: list[JointState] = []
        self.commanded: list[JointState] = []
        self.log: list[str] = []
        self._context = Context()
        rclpy.init(context=self._context)
        self.node = Node("robot", context=self._context, namespace=namespace)
        self._publishers = {
            camera.name: self.node.create_publisher(
                Image if camera.transport == "raw" else CompressedImage, camera.topic, qos_profile_sensor_data
            )
            for camera in embodiment.cameras
        }
        self._joint_states = self.node.create_publisher(JointState, embodiment.state.topic, qos_profile_sensor_data)
        self._instruction = self.node.create_publisher(String, embodiment.instruction_topic, LATCHED)
        topic = embodiment.action_groups[0].topic
        self.node.create_subscription(JointTrajectory, topic, self.trajectories.append, 50)
        self.node.create_subscription(ActionChunk, "dit_policy/action_chunk", self.chunks.append, 50)
        self.node.create_subscription(PolicyStatus, "dit_policy/status", self._on_status, LATCHED)
        self.node.create_subscription(Heartbeat, "dit_policy/heartbeat", self.heartbeats.append, 50)
        self.node.create_subscription(JointState, "dit_policy/predicted_joint_states", self.predicted.append, 50)
        self.node.create_subscription(JointState, "dit_policy/commanded_joint_states", self.commanded.append, 50)
        self.node.create_subscription(Log, "/rosout", lambda message: self.log.append(message.msg), 100)
        self._action = ActionClient(self.node, ExecuteInstruction, "dit_policy/execute_instruction")
        self.node.create_timer(0.02, self._publish_joints)
        self.node.create_timer(0.05, self._publish_images)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._running = True
        self._thread.start()

    def mend(self) -> None:
        """All inputs in order; what a test spoils is one of these fields."""
        embodiment = self.embodiment
        self.joint_names = [*reversed(embodiment.state.joints), "panda_finger_joint1"]
        self.positions = dict.fromkeys(self.joint_names, 0.01) | {"panda_joint4": -1.5, "panda_joint6": 1.5}
        self.silent: set[str] = set()  # names of cameras, or "state"
        self.image_size = {camera.name: (camera.width, camera.height) for camera in embodiment.cameras}
        self.encoding = "rgb8"

    def close(self) -> None:
        self._running = False
        self._thread.join()
        self._action.destroy()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def _spin(self) -> None:
        while self._running:
            self._executor.spin_once(timeout_sec=0.05)

    def _on_status(self, message: PolicyStatus) -> None:
        self.status = message

    # --- what the robot says -----------------------------------------------------------------------------------------

    def _stamp(self) -> object:
        return self.node.get_clock().now().to_msg()

    def _publish_joints(self) -> None:
        if "state" in self.silent:
            return
        message = JointState(name=list(self.joint_names), position=[self.positions[n] for n in self.joint_names])
        message.header.stamp = self._stamp()
        self._joint_states.publish(message)

    def _publish_images(self) -> None:
        for camera in self.embodiment.cameras:
            if camera.name in self.silent:
                continue
            width, height = self.image_size[camera.name]
            picture = np.full((height, width, 3), 90, dtype=np.uint8)
            if camera.transport == "raw":
                message = Image(height=height, width=width, encoding=self.encoding, step=3 * width)
                message.data = picture.tobytes()
            else:
                message = CompressedImage(format="jpeg", data=cv2.imencode(".jpg", picture)[1].tobytes())
            message.header.stamp = self._stamp()
            self._publishers[camera.name].publish(message)

    def instruct(self, text: str) -> None:
        self._instruction.publish(String(data=text))

    # --- what the robot asks of the policy node ----------------------------------------------------------------------

    def call(self, kind: type, name: str, request: object, timeout: float = 90.0, once: bool = False) -> object:
        client = self.node.create_client(kind, name)
        try:
            wait_for(client.service_is_ready, f"service {name} appears", timeout)
            return ask(client, request, timeout, once)
        finally:
            self.node.destroy_client(client)

    def transition(self, name: str) -> bool:
        number = getattr(Transition, f"TRANSITION_{name.upper()}")
        request = ChangeState.Request(transition=Transition(id=number))

        def change() -> bool:
            return bool(self.call(ChangeState, "dit_policy/change_state", request, 40.0, once=True).success)

        return asking.transition(name, change, self.state)

    def state(self) -> str:
        return asking.label(self.call(GetState, "dit_policy/get_state", GetState.Request()).current_state)

    def set_instruction(self, text: str) -> SetInstruction.Response:
        return self.call(SetInstruction, "dit_policy/set_instruction", SetInstruction.Request(instruction=text))

    def set_parameter(self, name: str, value: object) -> object:
        message = Parameter(name, value=value).to_parameter_msg()
        request = SetParameters.Request(parameters=[message])
        return self.call(SetParameters, "dit_policy/set_parameters", request).results[0]

    def set_together(self, values: dict[str, object]) -> object:
        messages = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        request = SetParametersAtomically.Request(parameters=messages)
        return self.call(SetParametersAtomically, "dit_policy/set_parameters_atomically", request).result

    def parameters(self) -> dict[str, object]:
        """All of the node's parameters, as `ros2 param dump` asks for them."""
        names = list(self.call(ListParameters, "dit_policy/list_parameters", ListParameters.Request()).result.names)
        answer = self.call(GetParameters, "dit_policy/get_parameters", GetParameters.Request(names=names))
        return {name: parameter_value_to_python(value) for name, value in zip(names, answer.values, strict=True)}

    def resume(self) -> Trigger.Response:
        return self.call(Trigger, "dit_policy/resume", Trigger.Request())

    def execute(self, instruction: str, time_limit: int = 0) -> Goal:
        """Send a goal of ~/execute_instruction; its handle says whether it was accepted."""
        return Goal(self._action, instruction, time_limit)

    def wait_for_log(self, words: str) -> None:
        wait_for(lambda: any(words in line for line in self.log), f"the log says '{words}', not only {self.log}")

    def wait_for_verdict(self, verdict: int) -> ActionChunk:
        """The next chunk published from now on with this verdict."""
        seen = len(self.chunks)
        matching = wait_for(
            lambda: [chunk for chunk in self.chunks[seen:] if chunk.verdict == verdict],
            f"a chunk with verdict {verdict}",
        )
        return matching[0]
