"""The action ~/execute_instruction: an instruction for as long as its goal runs, for behaviour trees."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dit_policy_msgs.action import ExecuteInstruction
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from dit_policy_ros.nodes.conversions import duration_message
from dit_policy_ros.nodes.instructions import Instructions
from dit_policy_ros.nodes.motion import Motion
from dit_policy_ros.runtime.decisions import Outcome

_POLL_S = 0.02
_KEPT_S = 60  # how long a result waits to be fetched


class _PatientServer(ActionServer):
    """An action server whose goals are under way without a callback that runs.

    rclpy means the execute callback to last as long as the goal. In a single thread it would have to await, and a
    callback that awaits makes rclpy's executor spin without a pause.
    """

    def notify_execute(self, goal_handle: ServerGoalHandle, execute_callback: Callable[..., Any] | None) -> None:
        """Run the callback, which ends the goal; without one the goal is only marked as executing."""
        if execute_callback is not None:
            super().notify_execute(goal_handle, execute_callback)


@dataclass
class _Goal:
    handle: ServerGoalHandle
    generation: int  # of the instructions, when it was the goal's
    time_limit: float  # s, 0: none
    last_ns: int
    elapsed: float = 0.0
    sent: int = 0
    rejected: int = 0


class Execution:
    """Serves one goal at a time; a new one takes the place of the one that runs.

    `motion()` gives the session's motion, None while nothing is loaded; `manual()` whether a fault lasts until somebody
    resumes: then it ends the goal, as nothing would move any more. All calls by the executor's thread but `hear`.
    """

    def __init__(
        self,
        node: Node,
        instructions: Instructions,
        motion: Callable[[], Motion | None],
        manual: Callable[[], bool],
        now_ns: Callable[[], int],
    ) -> None:
        self._instructions = instructions
        self._motion = motion
        self._manual = manual
        self._now_ns = now_ns
        self._log = node.get_logger()
        self._goal: _Goal | None = None
        self._heard: deque[Outcome] = deque(maxlen=100)
        self._server = _PatientServer(
            node,
            ExecuteInstruction,
            "~/execute_instruction",
            self._ended,
            goal_callback=self._judge,
            handle_accepted_callback=self._accept,
            cancel_callback=lambda _: CancelResponse.ACCEPT,
            result_timeout=_KEPT_S,
        )
        self._timer = node.create_timer(_POLL_S, self._poll, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._timer.cancel()

    def hear(self, outcome: Outcome) -> None:
        """A chunk was decided on; its feedback goes out at the next poll. Any thread."""
        if self._goal is not None:
            self._heard.append(outcome)

    def deactivated(self) -> None:
        """The node leaves its active state: the goal, if there is one, is aborted, and its instruction void."""
        if self._goal is not None:
            self._instructions.forget()
            motion = self._motion()
            if motion is not None:
                motion.instruct("")
            self._end(ExecuteInstruction.Result.DEACTIVATED, "the node was deactivated", ServerGoalHandle.abort)

    def close(self) -> None:
        """Serve no more."""
        self._server.destroy()

    # --- a goal's way ------------------------------------------------------------------------------------------------

    def _judge(self, request: ExecuteInstruction.Goal) -> GoalResponse:
        reason = self._refusal(request)
        if reason is None:
            return GoalResponse.ACCEPT
        # ROS has no place for the reason in the answer.
        self._log.error(f"the goal '{request.instruction}' is rejected: {reason}")
        return GoalResponse.REJECT

    def _refusal(self, request: ExecuteInstruction.Goal) -> str | None:
        if not request.instruction.strip():
            return "its instruction is empty"
        if request.time_limit.sec < 0:
            return f"its time limit is {_seconds(request.time_limit)} s, expected 0 (none) or more"
        motion = self._motion()
        if motion is None or not motion.running:
            return "the node is not active"
        if motion.fault is not None and self._manual():
            return f"a fault has not been resumed from: {motion.fault.reason}"
        return None

    def _accept(self, handle: ServerGoalHandle) -> None:
        if self._goal is not None:
            self._end(ExecuteInstruction.Result.PREEMPTED, "another goal came", ServerGoalHandle.abort)
        request = handle.request
        reason = self._instructions.accept(request.instruction)
        if reason is not None:  # between `_judge` and now the node was cleaned up
            self._log.error(reason)
        handle.execute()
        self._heard.clear()
        limit = _seconds(request.time_limit)
        self._goal = _Goal(handle, self._instructions.generation, limit, self._now_ns())
        self._timer.reset()

    def _poll(self) -> None:
        goal = self._goal
        if goal is None:
            return
        now_ns = self._now_ns()
        goal.elapsed += max(0, now_ns - goal.last_ns) / 1e9  # a clock that goes back gives no time back
        goal.last_ns = now_ns
        while self._heard:
            self._feed_back(goal, self._heard.popleft())
        self._end_if_over(goal)

    def _end_if_over(self, goal: _Goal) -> None:
        motion = self._motion()
        fault = motion.fault if motion is not None else None
        result = ExecuteInstruction.Result
        if goal.handle.is_cancel_requested:
            self._rest()
            self._end(result.CANCELED, "cancelled; the arm is brought to rest", ServerGoalHandle.canceled)
        elif self._instructions.generation != goal.generation:
            message = f"another instruction came: '{self._instructions.text}'"
            self._end(result.PREEMPTED, message, ServerGoalHandle.abort)
        elif fault is not None and self._manual():
            self._rest()
            self._end(result.FAULT, fault.reason, ServerGoalHandle.abort)
        elif goal.time_limit > 0 and goal.elapsed >= goal.time_limit:
            self._rest()
            message = f"the time limit of {goal.time_limit} s is over; the arm is brought to rest"
            self._end(result.TIME_LIMIT, message, ServerGoalHandle.succeed)

    def _rest(self) -> None:
        self._instructions.forget()
        motion = self._motion()
        if motion is not None:
            motion.rest()

    def _end(self, code: int, message: str, finish: Callable[[ServerGoalHandle], None]) -> None:
        goal, self._goal = self._goal, None
        assert goal is not None
        self._timer.cancel()
        result = ExecuteInstruction.Result(code=code, message=message)
        result.chunks_sent, result.chunks_rejected = goal.sent, goal.rejected

        def conclude(handle: ServerGoalHandle) -> ExecuteInstruction.Result:
            finish(handle)
            return result

        self._log.info(f"goal '{goal.handle.request.instruction}' ended: {message}")
        self._server.notify_execute(goal.handle, conclude)

    def _ended(self, handle: ServerGoalHandle) -> ExecuteInstruction.Result:
        raise AssertionError("rclpy's own execution is not used")

    def _feed_back(self, goal: _Goal, outcome: Outcome) -> None:
        goal.sent += outcome.sent
        goal.rejected += not outcome.decision.accepted
        feedback = ExecuteInstruction.Feedback(
            elapsed=duration_message(goal.elapsed),
            chunks_sent=goal.sent,
            chunks_rejected=goal.rejected,
            verdict=int(outcome.decision.verdict),
            reason=outcome.decision.reason,
        )
        if outcome.chunk is not None:
            feedback.latency = duration_message(outcome.chunk.inference_duration)
        goal.handle.publish_feedback(feedback)


def _seconds(duration: Any) -> float:
    return float(duration.sec + duration.nanosec * 1e-9)
