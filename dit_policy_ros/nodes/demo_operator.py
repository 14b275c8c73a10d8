"""The operator of the demo: resets scenes, gives instructions, switches the policy on and off, and judges.

Only topics and services connect it to the simulator and to the policy node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from dit_policy_msgs.msg import ActionChunk, SceneState
from dit_policy_msgs.srv import ResetScene
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import JointState
from std_msgs.msg import String

from dit_policy_ros.nodes.account import STALE_VERDICTS
from dit_policy_ros.nodes.demo_report import Episode, Referee, Snapshot
from dit_policy_ros.nodes.processes import Child
from dit_policy_ros.runtime.gate import Verdict
from dit_policy_ros.runtime.messages import stamp_ns

_FRESH_S = 0.3  # after a reset, until the policy's observation history holds nothing from before it
_START_UP_S = 90.0
_ANSWER_S = 10.0
_AGAIN_S = 3.0


class DemoError(RuntimeError):
    """Why the demo could not go on."""


class Operator:
    """Resets scenes, gives instructions, switches the policy on and off, and watches.

    Every wait is for a condition, has a time limit, and notices a child's death. The executor is spun only in waits,
    so callbacks and code never run at the same time.
    """

    def __init__(self, children: Sequence[Child], interrupted: Callable[[], bool] = lambda: False) -> None:
        """`interrupted` is asked in every wait; once it is true, KeyboardInterrupt is raised."""
        self._children = children
        self._interrupted = interrupted
        self._node = rclpy.create_node("operator")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._instruction = self._node.create_publisher(String, "instruction", latched)
        self._reset = self._node.create_client(ResetScene, "reset_scene")
        self._states = self._node.create_client(GetState, "dit_policy/get_state")
        self._transitions = self._node.create_client(ChangeState, "dit_policy/change_state")
        self._node.create_subscription(JointState, "joint_states", self._on_joints, qos_profile_sensor_data)
        self._node.create_subscription(SceneState, "scene_state", self._on_scene, 10)
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._node.create_subscription(ActionChunk, "dit_policy/action_chunk", self._on_chunk, 100)
        self._joints: dict[str, float] = {}
        self._scene = SceneState()
        self._scenes = 0
        self._episode: Episode | None = None
        self.simulation_lost = 0.0  # s that the simulator fell behind real time, since it started

    def close(self) -> None:
        """Leave the graph."""
        self._executor.shutdown()
        self._node.destroy_node()

    def prepare(self) -> None:
        """Wait for the simulator's picture of the scene, and for the policy to be loaded and warm."""
        self._wait(lambda: self._scenes > 0 and bool(self._joints), "the simulator's first scene", _START_UP_S)
        self._hear_from_policy()
        self._change_state(Transition.TRANSITION_CONFIGURE, "configure", _START_UP_S)

    def run(self, episode: Episode, target: str, progress: Callable[[], None]) -> None:
        """Run one episode to its verdict, filling `episode` in. `progress` is called as it goes on.

        The policy is inactive before and after, so that no motion is carried over into another scene.
        """
        self._instruction.publish(String(data=episode.instruction))
        self._reset_scene(episode.seed)
        self._episode = episode
        self._change_state(Transition.TRANSITION_ACTIVATE, "activate")
        self._watch(episode, target, progress)
        self._change_state(Transition.TRANSITION_DEACTIVATE, "deactivate")
        self._episode = None

    def _watch(self, episode: Episode, target: str, progress: Callable[[], None]) -> None:
        began_ns = stamp_ns(self._scene)
        referee = Referee(episode, target, _poses(self._scene))
        while not episode.over:
            self._next_scene()
            now = (stamp_ns(self._scene) - began_ns) / 1e9
            referee.see(Snapshot(now, dict(self._joints), _poses(self._scene)))
            progress()

    def _reset_scene(self, seed: int) -> None:
        answer = self._call(self._reset, ResetScene.Request(seed=seed), "reset_scene")
        if not answer.success:
            raise DemoError(f"the simulator did not reset to seed {seed}: {answer.message}")
        self._wait(lambda: self._scene.seed == seed, f"the scene of seed {seed}")
        fresh_ns = stamp_ns(self._scene) + round(_FRESH_S * 1e9)
        self._wait(lambda: stamp_ns(self._scene) >= fresh_ns, f"{_FRESH_S} s of the scene of seed {seed}")

    def _next_scene(self) -> None:
        seen = self._scenes
        self._wait(lambda: self._scenes > seen, "the next scene_state")

    def _change_state(self, transition: int, label: str, seconds: float = _ANSWER_S) -> None:
        request = ChangeState.Request(transition=Transition(id=transition))
        if not self._call(self._transitions, request, f"{label} the policy", seconds).success:
            policy = next(child for child in self._children if child.name == "policy node")
            raise DemoError(f"the policy node did not {label}; the last lines of {policy.log}:\n{policy.last_lines()}")

    def _hear_from_policy(self) -> None:
        """Until it answers: a request, or its answer, is lost while the two sides are still finding each other.

        A question can be asked again, the transition that follows cannot.
        """
        self._wait(self._states.service_is_ready, f"the service {self._states.srv_name}", _START_UP_S)
        asked = [(time.monotonic(), self._states.call_async(GetState.Request()))]

        def answered() -> bool:
            if time.monotonic() - asked[-1][0] > _AGAIN_S:
                asked.append((time.monotonic(), self._states.call_async(GetState.Request())))
            return any(future.done() for _, future in asked)

        self._wait(answered, "the policy's state", _START_UP_S)

    def _call(self, client: Client, request: Any, what: str, seconds: float = _ANSWER_S) -> Any:
        self._wait(client.service_is_ready, f"the service {client.srv_name}", _START_UP_S)
        future = client.call_async(request)
        self._wait(future.done, f"an answer to {what}", seconds)
        return future.result()

    def _wait(self, until: Callable[[], bool], what: str, seconds: float = _ANSWER_S) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            if self._interrupted():
                raise KeyboardInterrupt
            for child in self._children:
                child.check()
            if time.monotonic() > deadline:
                logs = " and ".join(str(child.log) for child in self._children)
                raise DemoError(f"waited {seconds:.0f} s in vain for {what}; see {logs}")
            self._executor.spin_once(timeout_sec=0.05)

    def _on_joints(self, message: JointState) -> None:
        self._joints = dict(zip(message.name, message.position, strict=True))

    def _on_scene(self, message: SceneState) -> None:
        self._scene = message
        self._scenes += 1

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            for pair in status.values:
                if pair.key == "lost_s":
                    self.simulation_lost = float(pair.value)

    def _on_chunk(self, message: ActionChunk) -> None:
        episode = self._episode
        if episode is None:
            return
        verdict = Verdict(message.verdict)
        if message.instruction != episode.instruction:
            raise DemoError(f"the policy acted on '{message.instruction}', it was told '{episode.instruction}'")
        if message.steps:
            duration = message.inference_duration
            episode.chunk_seconds.append(duration.sec + duration.nanosec * 1e-9)
        if verdict in STALE_VERDICTS:
            episode.stale += 1
        elif verdict is not Verdict.ACCEPTED:
            episode.rejected += 1


def _poses(scene: SceneState) -> dict[str, tuple[float, float, float]]:
    poses = zip(scene.blocks, scene.x, scene.y, scene.yaw, strict=True)
    return {colour: (x, y, yaw) for colour, x, y, yaw in poses}
