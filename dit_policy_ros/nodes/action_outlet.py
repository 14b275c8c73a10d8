"""The way to a controller by its FollowJointTrajectory action: each trajectory is a goal that replaces the one before.

The action's services are called directly. rclpy's ActionClient (9.1.2) registers each goal twice, loses an answer that
comes in between, which it may when the goal is not sent from the executor's thread, and keeps the first future for
ever; it would also take in the feedback, which nobody here needs.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from action_msgs.msg import GoalStatus, GoalStatusArray
from rclpy.client import Client
from rclpy.node import Node
from rclpy.qos import qos_profile_action_status_default
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.embodiment import ActionGroup
from dit_policy_ros.nodes.controllers import follow_trajectory, topic_of
from dit_policy_ros.nodes.conversions import trajectory_message
from dit_policy_ros.nodes.outlet import COMMANDS, Channel
from dit_policy_ros.runtime.faults import Fault, Trouble
from dit_policy_ros.runtime.trajectory import Point, Trajectory

ANSWER_S = 1.0  # within which a controller accepts or refuses a goal
TOLD_S = 1.0  # how long what became of a goal is told: longer than a status takes to be seen
_POLL_S = 0.005
_FLUSH_S = 0.1
_REMEMBERED = 64  # goals
_ACTIVE = (GoalStatus.STATUS_ACCEPTED, GoalStatus.STATUS_EXECUTING, GoalStatus.STATUS_CANCELING)
_ENDS = {
    GoalStatus.STATUS_ABORTED: "was aborted",
    GoalStatus.STATUS_CANCELED: "was canceled by somebody else",
    GoalStatus.STATUS_UNKNOWN: "is unknown to the controller, which was restarted",
}
_CODES = {
    -1: "INVALID_GOAL",
    -2: "INVALID_JOINTS",
    -3: "OLD_HEADER_TIMESTAMP",
    -4: "PATH_TOLERANCE_VIOLATED",
    -5: "GOAL_TOLERANCE_VIOLATED",
}


class ActionOutlet:
    """FollowJointTrajectory goals on the action that the group's topic names.

    What becomes of a goal is trouble for a second, or until a newer one is accepted: a controller ends the goal that it
    replaces. No longer, since no newer one is sent while there is trouble.
    """

    rate = 0.0

    def __init__(self, node: Node, group: ActionGroup) -> None:
        self.group = group
        self._node = node
        action, name = follow_trajectory()
        if not name.startswith("control_msgs"):
            node.get_logger().warning(
                f"control_msgs is not installed: '{group.topic}' is called as {name}, which only the simulator offers. "
                "For a real controller install control_msgs"
            )
        self._types = action.Impl
        self._goal_type = action.Goal
        self._goals = node.create_client(self._types.SendGoalService, f"{group.topic}/_action/send_goal")
        self._results = node.create_client(self._types.GetResultService, f"{group.topic}/_action/get_result")
        self._lock = threading.Lock()
        self._ours: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._newest = b""
        self._asked_s: float | None = None  # when the newest goal was sent, while it is unanswered
        self._waiting: list[tuple[Client, Any]] = []  # requests of the newest goal and their futures
        self._trouble: Trouble | None = None
        self._told = True
        self._told_s = 0.0  # since when

    def send(self, trajectory: Trajectory, now_ns: int, start: Point) -> None:
        """Ask the controller to follow it in place of the goal before; what it answers is in `troubles`."""
        goal_id = uuid.uuid4().bytes
        request = self._types.SendGoalService.Request(goal=self._goal_type(trajectory=trajectory_message(trajectory)))
        request.goal_id.uuid = list(goal_id)
        with self._lock:
            abandoned, self._waiting = self._waiting, []
            self._ours.append(goal_id)
            self._newest, self._asked_s = goal_id, time.monotonic()
        for client, future in abandoned:
            client.remove_pending_request(future)
        self._ask(self._goals, request, goal_id, self._on_answer)

    def _ask(self, client: Client, request: Any, goal_id: bytes, then: Any) -> None:
        future = client.call_async(request)
        with self._lock:
            if goal_id == self._newest:
                self._waiting.append((client, future))
        future.add_done_callback(partial(then, goal_id))

    def _on_answer(self, goal_id: bytes, future: Any) -> None:
        accepted = future.result().accepted
        with self._lock:
            if goal_id != self._newest:
                return
            self._asked_s = None
            if not accepted:
                reason = f"the controller refused a goal of {len(self.group.joints)} joints on '{self.group.topic}'"
                self._note(f"{reason}; its log says why")
            elif self._told:
                self._trouble = None  # one that nobody has asked for yet stays
        if accepted:
            request = self._types.GetResultService.Request()
            request.goal_id.uuid = list(goal_id)
            self._ask(self._results, request, goal_id, self._on_result)

    def _on_result(self, goal_id: bytes, future: Any) -> None:
        response = future.result()
        with self._lock:
            if goal_id != self._newest or response.status not in _ENDS:
                return
            code = response.result.error_code
            reason = f"the goal on '{self.group.topic}' {_ENDS[response.status]}: error_code {code}"
            self._note(f"{reason} ({_CODES.get(code, 'no error')}), error_string '{response.result.error_string}'")

    def _note(self, reason: str) -> None:
        self._trouble, self._told = Trouble(Fault.CONTROLLER, reason), False

    def beat(self, now_ns: int) -> None:
        """Nothing: a goal is whole."""

    def flush(self, timeout: float) -> bool:
        """Wait until the newest goal is answered, but not long: called by the executor's thread, it cannot hear that.

        True as well if there is a server that the goal, a reliable request, is on its way to.
        """
        deadline = time.monotonic() + min(timeout, _FLUSH_S)
        while self._asked_s is not None:
            if time.monotonic() > deadline:
                return self._goals.service_is_ready()
            time.sleep(_POLL_S)
        return True

    def listeners(self) -> int:
        """1 if there is a server of the action, or 0."""
        return int(self._goals.service_is_ready())

    def channels(self) -> Sequence[Channel]:
        """The states of the action's goals, and the controller's topic, on which only other people write."""
        status = self._node.resolve_topic_name(f"{self.group.topic}/_action/status")
        trajectory = self._node.resolve_topic_name(topic_of(self.group, "joint_trajectory"))
        return [
            Channel(status, GoalStatusArray, qos_profile_action_status_default),
            Channel(trajectory, JointTrajectory, COMMANDS),
        ]

    def recognises(self, message: Any) -> bool:
        """Whether every goal that is followed is ours; a message on the controller's topic never is."""
        if isinstance(message, JointTrajectory):
            return False
        goals = [bytes(goal.goal_info.goal_id.uuid) for goal in message.status_list if goal.status in _ACTIVE]
        with self._lock:
            return all(goal in self._ours for goal in goals)

    def troubles(self) -> list[Trouble]:
        """What became of the newest goal, if that was not what it was sent for."""
        now_s = time.monotonic()
        with self._lock:
            if self._trouble is not None:
                if not self._told:
                    self._told, self._told_s = True, now_s
                if now_s - self._told_s <= TOLD_S:
                    return [self._trouble]
                self._trouble = None
            if self._asked_s is not None and ANSWER_S < now_s - self._asked_s <= ANSWER_S + TOLD_S:
                reason = f"the controller has not answered a goal on '{self.group.topic}' for {ANSWER_S} s"
                return [Trouble(Fault.CONTROLLER, f"{reason}; is it running?")]
        return []

    def close(self) -> None:
        """See Outlet."""
        with self._lock:
            self._newest = b""
        self._node.destroy_client(self._goals)
        self._node.destroy_client(self._results)
