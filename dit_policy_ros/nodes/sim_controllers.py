"""The simulator's controllers, each with what a robot's offers: trajectories, an action, positions, its state.

`<controller>/joint_trajectory`, `<controller>/follow_joint_trajectory` and `<controller>/commands` (Float64MultiArray,
in the order of the controller's joints) are three ways to the same controller; a command on one takes the place of
whatever came before on any. Callbacks, in the thread that spins ROS, only queue; everything else is the simulating
thread's.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dit_policy_msgs.msg import TrajectoryControllerState
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.node import Node
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from dit_policy_ros.nodes.controllers import follow_trajectory
from dit_policy_ros.runtime.commands import Rejection, read_command
from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.trajectory import Point
from dit_policy_ros.sim.simulation import Simulation
from dit_policy_ros.sim.trajectory_controller import ControllerState, TrajectoryController

Command = Callable[[int], None]
"""What to do at the start of a tick, given the tick's stamp (ns)."""
Commands = queue.SimpleQueue[Command]

_INVALID_GOAL, _PATH_TOLERANCE_VIOLATED = -1, -4


@dataclass
class _Goal:
    """The goal being followed, until `end_ns`."""

    handle: ServerGoalHandle
    end_ns: int


@dataclass(frozen=True)
class _End:
    """How a goal ended, to be told in ROS's thread."""

    handle: ServerGoalHandle
    how: Literal["succeed", "abort", "canceled"]
    code: int = 0
    text: str = ""


class SimController:
    """A trajectory controller of some of the simulation's joints; `name` begins the names of its topics and action."""

    def __init__(
        self, node: Node, simulation: Simulation, name: str, joints: Sequence[str], commands: Commands
    ) -> None:
        self._simulation = simulation
        self._places = [simulation.joint_names.index(joint) for joint in joints]
        self._commands = commands
        self._node = node
        self._log = node.get_logger().get_child(name)
        self._partial = bool(node.get_parameter("allow_partial_joints_goal").value)
        self._rules = TrajectoryController(
            joints,
            allow_partial_joints_goal=self._partial,
            interpolate_from_desired_state=bool(node.get_parameter("interpolate_from_desired_state").value),
        )
        self._goal: _Goal | None = None
        self._ended: deque[_End] = deque()
        self._state = node.create_publisher(TrajectoryControllerState, f"{name}/controller_state", 10)
        node.create_subscription(JointTrajectory, f"{name}/joint_trajectory", self._queue_trajectory, 10)
        node.create_subscription(Float64MultiArray, f"{name}/commands", self._queue_positions, 10)
        self._action, _ = follow_trajectory()
        self._server = ActionServer(
            node,
            self._action,
            f"{name}/follow_joint_trajectory",
            execute_callback=self._never,
            goal_callback=self._judge_goal,
            handle_accepted_callback=self._queue_goal,
            cancel_callback=lambda _: CancelResponse.ACCEPT,
        )
        self._wake_up = node.create_guard_condition(self._tell_ends)

    # --- the spinning thread -----------------------------------------------------------------------------------------

    def _queue_trajectory(self, message: JointTrajectory) -> None:
        self._commands.put(partial(self._receive, message, "trajectory"))

    def _queue_positions(self, message: Float64MultiArray) -> None:
        # A point at once: the reference is there at the next update, and holds.
        point = JointTrajectoryPoint(positions=message.data)
        trajectory = JointTrajectory(joint_names=list(self._rules.joint_names), points=[point])
        self._commands.put(partial(self._receive, trajectory, "positions"))

    def _judge_goal(self, goal: Any) -> GoalResponse:
        now_ns = int(self._node.get_clock().now().nanoseconds)
        command = read_command(
            goal.trajectory, self._rules.joint_names, now_ns, allow_partial_joints_goal=self._partial
        )
        if isinstance(command, Rejection):
            self._log.error(f"goal refused ({command.rule}): {command.reason}")
            return GoalResponse.REJECT
        return GoalResponse.ACCEPT

    def _queue_goal(self, handle: ServerGoalHandle) -> None:
        self._commands.put(partial(self._follow_goal, handle))

    def _never(self, handle: ServerGoalHandle) -> Any:
        raise AssertionError("a goal is executed by the simulation, and concluded by _tell_ends")

    def _tell_ends(self) -> None:
        # A goal is not executed in a coroutine that waits for its end: on Jazzy that keeps the executor spinning.
        while self._ended:
            end = self._ended.popleft()
            end.handle.execute(partial(self._conclude, end))

    def _conclude(self, end: _End, handle: ServerGoalHandle) -> Any:
        getattr(handle, end.how)()
        return self._action.Result(error_code=end.code, error_string=end.text)

    # --- the simulating thread ---------------------------------------------------------------------------------------

    def reset(self, why: str) -> None:
        """Forget the trajectory; hold the joints where the next update finds them."""
        self._rules.reset()
        self._end_goal("abort", _INVALID_GOAL, why)

    def update(self, now_ns: int) -> None:
        """One control cycle."""
        if self._goal is not None and self._goal.handle.is_cancel_requested:
            self._rules.reset()
            self._end_goal("canceled", 0, "canceled: the joints hold")
        measured = self._simulation.q[self._places], self._simulation.qd[self._places]
        position, _, _ = self._rules.update(now_ns, *measured)
        try:
            self._simulation.set_targets(self._rules.joint_names, position)
        except ValueError as error:
            # The real controller does not look at limits either; the drives behind it fault.
            self._log.error(f"trajectory dropped, the joints hold: {error}", throttle_duration_sec=1.0)
            self._rules.reset()
            self._end_goal("abort", _PATH_TOLERANCE_VIOLATED, str(error))
        if self._goal is not None and now_ns >= self._goal.end_ns:
            self._end_goal("succeed")

    def publish(self, stamp: object) -> None:
        """Publish reference, feedback, error and output of the latest cycle, and the goal's feedback."""
        state = self._rules.state
        if state is None:
            return
        message = TrajectoryControllerState(
            joint_names=list(state.joint_names),
            reference=_point(state.reference),
            feedback=_point(state.feedback),
            error=_point(state.error),
            output=JointTrajectoryPoint(positions=state.reference.position.tolist()),
        )
        message.header.stamp = stamp
        self._state.publish(message)
        if self._goal is not None:
            self._goal.handle.publish_feedback(self._feedback(state, stamp))

    def _feedback(self, state: ControllerState, stamp: object) -> Any:
        feedback = self._action.Feedback(
            joint_names=list(state.joint_names),
            desired=_point(state.reference),
            actual=_point(state.feedback),
            error=_point(state.error),
        )
        feedback.header.stamp = stamp
        return feedback

    def _receive(self, message: JointTrajectory, what: str, now_ns: int) -> None:
        """Take a command, or log why it is refused: the publisher hears nothing, as on a robot."""
        rejection = self._rules.receive(message, now_ns)
        if rejection is not None:
            self._log.error(f"{what} refused ({rejection.rule}): {rejection.reason}")
            return
        self._end_goal("abort", _INVALID_GOAL, f"replaced by {what} on a topic")

    def _follow_goal(self, handle: ServerGoalHandle, now_ns: int) -> None:
        trajectory = handle.request.trajectory
        rejection = self._rules.receive(trajectory, now_ns)
        if rejection is not None:  # its stamp has passed since it was accepted
            self._tell(_End(handle, "abort", _INVALID_GOAL, rejection.reason))
            return
        self._end_goal("abort", _INVALID_GOAL, "replaced by a newer goal")
        last = trajectory.points[-1].time_from_start
        self._goal = _Goal(handle, (stamp_ns(trajectory) or now_ns) + last.sec * 1_000_000_000 + last.nanosec)

    def _end_goal(self, how: Literal["succeed", "abort", "canceled"], code: int = 0, text: str = "") -> None:
        goal, self._goal = self._goal, None
        if goal is not None:
            self._tell(_End(goal.handle, how, code, text))

    def _tell(self, end: _End) -> None:
        self._ended.append(end)
        self._wake_up.trigger()


def _point(point: Point) -> JointTrajectoryPoint:
    message = JointTrajectoryPoint(positions=point.position.tolist())
    if point.velocity is not None:
        message.velocities = point.velocity.tolist()
    if point.acceleration is not None:
        message.accelerations = point.acceleration.tolist()
    return message
