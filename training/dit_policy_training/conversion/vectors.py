"""Numbers out of messages, by the message's type in the bag: joints by name, fields of poses and twists, plain arrays.

What is meant, of each type, by a field of named joints:

- sensor_msgs/JointState: position, velocity, effort.
- Controller states (control_msgs/JointTrajectoryControllerState, our own) and FollowJointTrajectory's feedback:
  position, velocity, acceleration, effort of the reference, that is, of what is commanded; with `feedback.` before it,
  of what is measured. Older releases spell these desired and actual.
- Grippers: position, max_effort of control_msgs/GripperCommand, position, effort of its action's feedback, which are of
  one joint; position, velocity, effort by name of ParallelGripperCommand's feedback.
- std_msgs/Float64MultiArray and Float32MultiArray: the values in the order of the joints given; Float64, Float32: one.

Fields without joints are numbers at a path in any message, such as position.x; of geometry_msgs' types (stamped, with
covariance, or plain) the path begins at the pose, twist, transform or wrench itself.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dit_policy_training.conversion.layout import joint_field_names, source_fields
from dit_policy_training.conversion.options import Source

# Of each of geometry_msgs' types that wrap another: where that one stands.
_WRAPPED = {
    "PoseStamped": "pose",
    "PoseWithCovariance": "pose",
    "PoseWithCovarianceStamped": "pose.pose",
    "TwistStamped": "twist",
    "TwistWithCovariance": "twist",
    "TwistWithCovarianceStamped": "twist.twist",
    "TransformStamped": "transform",
    "WrenchStamped": "wrench",
}
_POINT_FIELDS = {"position": "positions", "velocity": "velocities", "acceleration": "accelerations", "effort": "effort"}
_REFERENCE, _MEASURED = ("reference", "desired"), ("feedback", "actual")

Numbers = Callable[[Any], np.ndarray]


class VectorError(ValueError):
    """A message without the numbers asked for; says the topic, the stamp, what was found and what was expected."""


def numbers_of(source: Source, msgtype: str) -> Numbers:
    """What takes a source's numbers (N,) float64 out of a message, in the order of layout.source_names.

    Raises VectorError at once for fields that the type has not, and from the function returned for a message without
    them, with other joints, or with a number that is not finite.
    """
    fields = source_fields(source)
    if source.joints:
        take = _joint_reader(msgtype, source)
        names = joint_field_names(source.joints, fields)
        return partial(_joints, take=take, fields=fields, joints=tuple(source.joints), names=names, topic=source.topic)
    root = _WRAPPED.get(msgtype.rsplit("/", 1)[-1], "") if msgtype.startswith("geometry_msgs/") else ""
    paths = tuple(f"{root}.{path}" if root else path for path in fields)
    return partial(_paths, paths=paths, names=fields, msgtype=msgtype, topic=source.topic)


def joint_numbers(message: Any, fields: Sequence[str], joints: Sequence[str], topic: str) -> np.ndarray:
    """(len(fields) * J,) float64 of a JointState: all joints' first field, then the next. Raises VectorError."""
    return _joints(message, _joint_state, fields, joints, joint_field_names(joints, fields), topic)


def when(message: Any) -> str:
    """The message's stamp, or its receive time, in words."""
    stamp_ns = message.stamp_ns
    if stamp_ns is not None:
        return f"stamp {stamp_ns // 10**9}.{stamp_ns % 10**9:09d}"
    return f"received at {message.receive_ns / 1e9:.3f} s"


_Named = tuple[Sequence[str] | None, Sequence[float]]  # joint names (None: the values come in the order given)
_Reader = Callable[[Any, str], _Named]


def _joints(
    message: Any, take: _Reader, fields: Sequence[str], joints: Sequence[str], names: Sequence[str], topic: str
) -> np.ndarray:
    parts = [_select(*take(message, field), joints, field, message, topic) for field in fields]
    return _finite(np.concatenate(parts), names, message, topic)


def _select(
    names: Sequence[str] | None, values: Sequence[float], joints: Sequence[str], field: str, message: Any, topic: str
) -> np.ndarray:
    expected = list(joints) if names is None else list(names)
    if len(values) != len(expected):
        raise _error(
            message, topic, f"{len(values)} values of '{field}'", f"{len(expected)}: {', '.join(expected) or 'none'}"
        )
    missing = [joint for joint in joints if joint not in expected]
    if missing:
        found = f"no joint '{missing[0]}', only {', '.join(expected) or 'an empty message'}"
        raise _error(message, topic, found, f"all of {', '.join(joints)}")
    twice = [joint for joint in joints if expected.count(joint) > 1]
    if twice:
        raise _error(message, topic, f"joint '{twice[0]}' twice", "each joint once")
    return np.array([values[expected.index(joint)] for joint in joints], dtype=np.float64)


def _paths(message: Any, paths: Sequence[str], names: Sequence[str], msgtype: str, topic: str) -> np.ndarray:
    return _finite(np.array([_at(message, path, msgtype, topic) for path in paths]), names, message, topic)


def _at(message: Any, path: str, msgtype: str, topic: str) -> float:
    value = message.msg
    for part in path.split("."):
        if not hasattr(value, part):
            there = ", ".join(name for name in getattr(value, "__dict__", {}) if not name.startswith("_"))
            raise _error(message, topic, f"no '{part}' of '{path}' in {msgtype}", there or "a field that is there")
        value = getattr(value, part)
    if isinstance(value, bool | np.bool_ | int | float | np.number):
        return float(value)
    raise _error(message, topic, f"'{path}' of {msgtype} is no number", "the path of a number, such as position.x")


def _finite(values: np.ndarray, names: Sequence[str], message: Any, topic: str) -> np.ndarray:
    for name, value in zip(names, values, strict=True):
        if not np.isfinite(value):
            raise _error(message, topic, f"'{name}' is {value}", "a finite number")
    return values


def _error(message: Any, topic: str, found: str, expected: str) -> VectorError:
    return VectorError(f"{topic}, {when(message)}: found {found}; expected {expected}")


def _joint_reader(msgtype: str, source: Source) -> _Reader:
    name = msgtype.rsplit("/", 1)[-1]
    known: dict[str, tuple[_Reader, Sequence[str]]] = {
        "JointState": (_joint_state, ("position", "velocity", "effort")),
        "JointTrajectoryControllerState": (_controller_state, _with_feedback(_POINT_FIELDS)),
        "TrajectoryControllerState": (_controller_state, _with_feedback(_POINT_FIELDS)),
        "FollowJointTrajectory_FeedbackMessage": (_follow_feedback, _with_feedback(_POINT_FIELDS)),
        "GripperCommand": (_gripper_command, ("position", "max_effort")),
        "GripperCommand_FeedbackMessage": (_gripper_feedback, ("position", "effort")),
        "ParallelGripperCommand_FeedbackMessage": (_parallel_feedback, ("position", "velocity", "effort")),
        "Float64MultiArray": (_array, ("position", "velocity", "effort")),
        "Float32MultiArray": (_array, ("position", "velocity", "effort")),
        "Float64": (_scalar, ("position", "velocity", "effort")),
        "Float32": (_scalar, ("position", "velocity", "effort")),
    }
    if name not in known:
        raise VectorError(
            f"{source.topic}: joints cannot be taken from {msgtype}, only from {', '.join(known)}; of other types name "
            "`fields` without `joints`"
        )
    reader, allowed = known[name]
    unknown = [field for field in source.fields if field not in allowed]
    if unknown:
        raise VectorError(
            f"{source.topic}: {msgtype} has no '{unknown[0]}' of joints, expected of {', '.join(allowed)}"
        )
    if name.startswith(("GripperCommand", "Float64", "Float32")) and not name.endswith("MultiArray"):
        _expect_one(source, msgtype)
    return reader


def _expect_one(source: Source, msgtype: str) -> None:
    if len(source.joints) != 1:
        raise VectorError(f"{source.topic}: {msgtype} is of one joint, but {', '.join(source.joints)} are named")


def _with_feedback(fields: Sequence[str] | dict[str, str]) -> tuple[str, ...]:
    return (*fields, *(f"feedback.{field}" for field in fields))


def _joint_state(message: Any, field: str) -> _Named:
    return message.name, getattr(message, field)


def _controller_state(state: Any, field: str) -> _Named:
    which, _, name = field.rpartition(".")
    spellings = _MEASURED if which else _REFERENCE
    points = [getattr(state, spelling) for spelling in spellings if hasattr(state, spelling)]
    values = [getattr(point, _POINT_FIELDS[name]) for point in points]
    # A release between the two spellings may have both, one of them empty.
    return state.joint_names, next((each for each in values if len(each)), [])


def _follow_feedback(message: Any, field: str) -> _Named:
    return _controller_state(message.feedback, field)


def _gripper_command(message: Any, field: str) -> _Named:
    return None, [getattr(message, field)]


def _gripper_feedback(message: Any, field: str) -> _Named:
    return _gripper_command(message.feedback, field)


def _parallel_feedback(message: Any, field: str) -> _Named:
    return _joint_state(message.feedback.state, field)


def _array(message: Any, field: str) -> _Named:
    return None, message.data


def _scalar(message: Any, field: str) -> _Named:
    return None, [message.data]
