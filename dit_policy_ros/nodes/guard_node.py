"""The guard: brings the arm to rest when the policy node's heartbeat fails to come although the arm moves.

It runs beside the robot, apart from the policy node, for what that cannot do itself: stop the arm when it was killed,
hangs, or is behind a network that broke. So it must be small: it loads neither torch nor the policy.

Design. The heartbeat is told by the steady clock. Once it is lost while the arm moves (by the heartbeat itself, or by a
command heard after it), each group whose arm moves gets one stop from where the joints are measured. Where the joint
states are stale or not usable, the stop starts from where the last command heard has the joints; where there was none
either, none can be made: the controller then follows what it has, which ends at rest. What rests is not commanded, and
nothing is sent again before the heartbeat has been back. A group of position commands has no trajectory to be replaced:
its controller holds its last position as the stream ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from dit_policy_msgs.msg import Heartbeat as HeartbeatMessage
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import JointState

from dit_policy_ros.embodiment import Embodiment, EmbodimentError
from dit_policy_ros.nodes.controllers import GUARD
from dit_policy_ros.nodes.declaration import Declaration
from dit_policy_ros.nodes.guarded_group import GuardedGroup
from dit_policy_ros.nodes.qos import LATCHED
from dit_policy_ros.nodes.spin import run_node
from dit_policy_ros.runtime.heartbeat import Heartbeat
from dit_policy_ros.runtime.messages import MessageError, stamp_ns
from dit_policy_ros.runtime.observations import ObservationBuffer, ObservationError
from dit_policy_ros.runtime.trajectory import Point

DECLARATIONS: tuple[Declaration, ...] = (
    Declaration("embodiment", "", "Embodiment YAML of this robot.", read_only=True),
    Declaration(
        "timeout",
        0.2,
        "How long after the last heartbeat the arm is stopped, s. At least two and a half times the policy node's "
        "period of heartbeats, or one lost on the way stops the arm.",
        0.05,
        5.0,
        read_only=True,
    ),
    Declaration("heartbeat", "dit_policy/heartbeat", "Topic of the policy node's heartbeat.", read_only=True),
)

_CREDIBLE = 1.5  # times its velocity limit is more than a joint moves
_CHECK_S = 0.02
_REPORT_S = 1.0
_LEAST_PERIODS = 2.5


class GuardNode(Node):
    """`dit_policy_guard`: parameters above. `~/status` (latched) and /diagnostics tell what it sees and did."""

    def __init__(self) -> None:
        super().__init__(GUARD)
        for declaration in DECLARATIONS:
            self.declare_parameter(declaration.name, declaration.default, declaration.descriptor())
        path = str(self.get_parameter("embodiment").value)
        if not path:
            raise ValueError("parameter 'embodiment' is empty; expected the robot's embodiment YAML")
        embodiment = Embodiment.load(path)
        self._heartbeat = Heartbeat(round(self.get_parameter("timeout").value * 1e9))
        self._period = 0.0
        self._losses = 0
        self._stops = 0
        self._last = ""  # what came of the latest loss
        self._arm = ObservationBuffer(embodiment, 1)
        self._state_topic = embodiment.state.topic
        self._groups = [
            GuardedGroup(self, group, self._on_command)
            for group in embodiment.action_groups
            if group.interface != "position"
        ]
        self._unguarded = [group.name for group in embodiment.action_groups if group.interface == "position"]
        self._connect()

    def _connect(self) -> None:
        # Best effort hears both kinds of publisher, and an old heartbeat sent again is worth nothing.
        topic = str(self.get_parameter("heartbeat").value)
        self.create_subscription(HeartbeatMessage, topic, self._on_heartbeat, qos_profile_sensor_data)
        self.create_subscription(JointState, self._state_topic, self._on_joints, qos_profile_sensor_data)
        self._status = self.create_publisher(DiagnosticStatus, "~/status", LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 5)
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # the node's own may stand still under use_sim_time
        self.create_timer(_CHECK_S, self._check, clock=steady)
        self.create_timer(_REPORT_S, self._report, clock=steady)
        if self._unguarded:
            self.get_logger().warning(
                f"action groups {', '.join(self._unguarded)} take positions: no stop can be sent to them, their "
                "controllers hold the last position as the stream ends"
            )
        self._report()

    # --- what is heard -----------------------------------------------------------------------------------------------

    def _on_heartbeat(self, message: HeartbeatMessage) -> None:
        if self._heartbeat.beat(message.moving, time.monotonic_ns()):
            self.get_logger().info("the heartbeat is back: the guard is armed again")
        if message.period != self._period:
            self._period = message.period
            timeout = self._heartbeat.timeout_ns / 1e9
            if timeout < _LEAST_PERIODS * self._period:
                self.get_logger().warning(
                    f"a heartbeat every {self._period} s leaves a timeout of {timeout} s no room for one that is lost: "
                    f"set timeout to {_LEAST_PERIODS * self._period} or more, or heartbeat_rate higher"
                )

    def _on_command(self) -> None:
        self._heartbeat.command(time.monotonic_ns())

    def _on_joints(self, message: JointState) -> None:
        self._arm.add(self._state_topic, stamp_ns(message), message)

    # --- what is done ------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        steady_ns = time.monotonic_ns()
        if not self._heartbeat.check(steady_ns):
            return
        self._losses += 1
        age = self._heartbeat.age(steady_ns)
        told = [self._bring_to_rest(group, steady_ns) for group in self._groups]
        self._last = f"no heartbeat for {age:.2f} s while the arm moved. {'. '.join(told)}"
        self.get_logger().error(self._last)
        self._report()

    def _bring_to_rest(self, group: GuardedGroup, steady_ns: int) -> str:
        """Stop a group, if it moves; what was done, in words."""
        name = f"'{group.group.name}'"
        measured, why = self._measured(group)
        moves = group.moves(steady_ns, measured)
        if moves is None:
            return f"{name} cannot be stopped: {why}, and no command to it was heard"
        if not moves:
            return f"{name} rests"
        start = measured if measured is not None and measured.velocity is not None else group.reference(steady_ns)
        assert start is not None  # `moves` knows of one of them
        group.stop(start)
        self._stops += 1
        if start is measured:
            return f"{name} was stopped from where it is measured"
        return f"{name} was stopped from where it was told to be, since {why}"

    def _measured(self, group: GuardedGroup) -> tuple[Point | None, str]:
        """The group's joints as measured, or why that is not known."""
        now_ns = int(self.get_clock().now().nanoseconds)
        try:
            position, velocity = self._arm.measured(group.joints, now_ns)
        except (ObservationError, MessageError) as error:
            return None, str(error)
        if velocity is None:
            return Point(now_ns, position), "no velocity of the joints is known yet"
        if not (np.isfinite(position).all() and np.isfinite(velocity).all()):
            return None, f"topic '{self._state_topic}' has a value that is not finite"
        for joint, speed in zip(group.joints, velocity, strict=True):
            limit = group.group.joints[joint].velocity
            if abs(speed) > _CREDIBLE * limit:  # a sensor that jumps, or a second publisher: not where the arm is
                return None, f"topic '{self._state_topic}' has {joint} move at {speed:.1f}, its limit is {limit}"
        return Point(now_ns, position, velocity), ""

    def _report(self) -> None:
        status = self._state()
        self._status.publish(status)
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)

    def _state(self) -> DiagnosticStatus:
        heartbeat = self._heartbeat
        age = heartbeat.age(time.monotonic_ns())
        level, message = DiagnosticStatus.OK, "the arm moves" if heartbeat.moving else "the arm rests"
        if heartbeat.sign == "none yet":
            level, message = DiagnosticStatus.WARN, "no heartbeat has been heard yet"
        elif heartbeat.sign == "lost":
            level = DiagnosticStatus.ERROR if heartbeat.moving else DiagnosticStatus.OK
            message = self._last if heartbeat.moving else f"no heartbeat for {age:.1f} s, the arm was at rest"
        values = {
            "heartbeat": heartbeat.sign,
            "heartbeat_age": f"{age:.3f}",
            "heartbeat_period": f"{self._period:.3f}",
            "timeout": f"{heartbeat.timeout_ns / 1e9:.3f}",
            "losses_while_moving": str(self._losses),
            "stops_sent": str(self._stops),
            "last_loss": self._last,
            "unguarded_groups": ", ".join(self._unguarded),
        }
        pairs = [KeyValue(key=key, value=value) for key, value in values.items()]
        return DiagnosticStatus(level=level, name=self.get_fully_qualified_name(), message=message, values=pairs)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of `ros2 run dit_policy_ros guard_node`: 0 after SIGINT or SIGTERM, 1 if it cannot start."""
    try:
        run_node(GuardNode, lambda _: None, args)
    except (EmbodimentError, ValueError) as error:
        print(f"{GUARD}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
