"""An episode of a dataset as ROS messages: what the robot's topics would have carried, on the grid of the frames.

Frame k is at start + round(k * 1e9 / fps), its pictures and joints stamped and received then. What the action says of
frame k is commanded at frame k+1, as the converter takes it: so converting the messages again gives the same rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from dit_policy_ros.embodiment import ActionGroup, Camera, Embodiment
from dit_policy_training.conversion.layout import command_topic, image_key
from dit_policy_training.conversion.message_types import types_to_write
from dit_policy_training.conversion.times import Ticks


class ReplayError(ValueError):
    """The dataset does not hold what the embodiment's topics carry; says what is missing."""


@dataclass(frozen=True)
class Numbers:
    """An episode's vectors with their names: states (N, S), actions (N, A) float32; the task of each frame."""

    state_names: Sequence[str]
    states: np.ndarray
    action_names: Sequence[str]
    actions: np.ndarray
    tasks: Sequence[str]
    relative: bool = False  # actions less the joints measured at the frame

    def state(self, names: Sequence[str]) -> np.ndarray | None:
        """(N, len(names)) float64, in the order of names; None if one of them is not there."""
        return _columns(self.states, self.state_names, names)

    def action(self, joints: Sequence[str]) -> np.ndarray | None:
        """Absolute positions (N, J) float64; None if a joint, or what it is relative to, is not there."""
        actions = _columns(self.actions, self.action_names, joints)
        if actions is None or not self.relative:
            return actions
        measured = self.state(joints)
        return None if measured is None else actions + measured


@dataclass(frozen=True)
class Outgoing:
    """A message to be recorded."""

    topic: str
    msgtype: str
    receive_ns: int
    message: Any


@dataclass
class Replay:
    """Makes the messages; `notes` says what of the dataset they cannot carry."""

    embodiment: Embodiment
    numbers: Numbers
    ticks: Ticks
    jpeg_quality: int = 95
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises ReplayError if the state lacks joints of the embodiment."""
        joints = self.embodiment.state.joints
        positions = self.numbers.state(joints)
        if positions is None:
            raise ReplayError(
                f"observation.state has {', '.join(self.numbers.state_names)}; expected all of {', '.join(joints)}, "
                "the joints of the embodiment that lies in the dataset"
            )
        self._positions = positions
        self._fields = {"velocity": _rates(positions, self.embodiment.fps), "effort": np.empty((len(positions), 0))}
        for name in self._fields:
            if (recorded := self.numbers.state([f"{joint}.{name}" for joint in joints])) is not None:
                self._fields[name] = recorded
        self._commands = {group.topic: self._positions_of(group) for group in self.embodiment.action_groups}
        told = {*joints, *(f"{joint}.{name}" for joint in joints for name in self._fields)}
        if others := [name for name in self.numbers.state_names if name not in told]:
            self.notes.append(f"left out of the state, as no topic of the embodiment has them: {', '.join(others)}")

    def types(self) -> dict[str, str]:
        """Every topic of the bag and its type."""
        groups = [group for group in self.embodiment.action_groups if self._commands[group.topic] is None]
        without = {command_topic(group.topic, group.interface) for group in groups}
        return {topic: kind for topic, kind in self.embodiment.topics.items() if topic not in without}

    def before(self) -> Iterator[Outgoing]:
        """What is known as the episode begins: the task, where the arm is, and the way it is to go."""
        yield self._instruction(0, self.ticks.at(0))
        yield self._joints(0)
        for group in self.embodiment.action_groups:
            if group.interface == "trajectory" and (actions := self._commands[group.topic]) is not None:
                yield self._send(group.topic, self.ticks.at(0), self._trajectory(group, actions))

    def at(self, frame: int, pictures: Mapping[str, np.ndarray]) -> Iterator[Outgoing]:
        """What comes with a frame; pictures (H, W, 3) uint8 RGB by camera's name."""
        if frame:
            yield self._joints(frame)
            yield from self._commands_at(frame)
            if self.numbers.tasks[frame] != self.numbers.tasks[frame - 1]:
                yield self._instruction(frame, self.ticks.at(frame))
        for camera in self.embodiment.cameras:
            yield self._picture(frame, camera, pictures[camera.name])

    def after(self) -> Iterator[Outgoing]:
        """What ends the last frame: its action's instant, to which the task is told to hold."""
        last = len(self._positions)
        yield from self._commands_at(last)
        yield self._instruction(last - 1, self.ticks.at(last))

    def _positions_of(self, group: ActionGroup) -> np.ndarray | None:
        joints = tuple(group.joints)
        if (missing := [joint for joint in joints if joint not in self.embodiment.state.joints]) and (
            group.interface == "trajectory"
        ):
            self.notes.append(
                f"no commands of '{group.name}': {', '.join(missing)} not in the state, so that nobody could tell from "
                "where the controller set out"
            )
            return None
        actions = self.numbers.action(joints)
        if actions is None:
            names = ", ".join(self.numbers.action_names)
            self.notes.append(f"no commands of '{group.name}': the dataset's action is {names}")
        return actions

    def _send(self, topic: str, time_ns: int, message: Any, suffix: str = "") -> Outgoing:
        return Outgoing(topic + suffix, message.__msgtype__, time_ns, message)

    def _make(self, msgtype: str, **fields: Any) -> Any:
        return types_to_write(msgtype).types[msgtype](**fields)

    def _header(self, time_ns: int) -> Any:
        stamp = self._make("builtin_interfaces/msg/Time", sec=time_ns // 10**9, nanosec=time_ns % 10**9)
        return self._make("std_msgs/msg/Header", stamp=stamp, frame_id="")

    def _instruction(self, frame: int, time_ns: int) -> Outgoing:
        text = self._make("std_msgs/msg/String", data=self.numbers.tasks[frame])
        return self._send(self.embodiment.instruction_topic, time_ns, text)

    def _joints(self, frame: int) -> Outgoing:
        time_ns = self.ticks.at(frame)
        message = self._make(
            "sensor_msgs/msg/JointState",
            header=self._header(time_ns),
            name=list(self.embodiment.state.joints),
            position=self._positions[frame],
            **{name: values[frame] for name, values in self._fields.items()},
        )
        return self._send(self.embodiment.state.topic, time_ns, message)

    def _picture(self, frame: int, camera: Camera, rgb: np.ndarray) -> Outgoing:
        time_ns = self.ticks.at(frame)
        header = self._header(time_ns)
        if camera.transport == "compressed":
            options = [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality]
            encoded, jpeg = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
            if not encoded:
                raise ReplayError(f"{image_key(camera.name)}: frame {frame} could not be encoded as JPEG")
            kind = "sensor_msgs/msg/CompressedImage"
            return self._send(
                camera.topic, time_ns, self._make(kind, header=header, format="jpeg", data=jpeg.reshape(-1))
            )
        height, width, _ = rgb.shape
        message = self._make(
            "sensor_msgs/msg/Image",
            header=header,
            height=height,
            width=width,
            encoding="rgb8",
            is_bigendian=0,
            step=3 * width,
            data=np.ascontiguousarray(rgb).reshape(-1),
        )
        return self._send(camera.topic, time_ns, message)

    def _commands_at(self, frame: int) -> Iterator[Outgoing]:
        """What streaming interfaces are told at a frame's instant: the action of the frame before."""
        time_ns = self.ticks.at(frame)
        for group in self.embodiment.action_groups:
            if (actions := self._commands[group.topic]) is None or group.interface == "trajectory":
                continue
            values = actions[frame - 1]
            if group.interface == "position":
                layout = self._make("std_msgs/msg/MultiArrayLayout", dim=[], data_offset=0)
                array = self._make("std_msgs/msg/Float64MultiArray", layout=layout, data=values)
                yield self._send(group.topic, time_ns, array)
            else:
                feedback = self._feedback(group, values, min(frame, len(actions) - 1), time_ns)
                yield self._send(group.topic, time_ns, feedback, "/_action/feedback")

    def _feedback(self, group: ActionGroup, desired: np.ndarray, frame: int, time_ns: int) -> Any:
        kind = "control_msgs/action/FollowJointTrajectory_Feedback"
        types = types_to_write(f"{kind}Message").types
        measured = self.numbers.state(tuple(group.joints))
        actual = np.empty(0) if measured is None else measured[frame]
        error = np.empty(0) if measured is None else desired - actual
        feedback = types[kind](
            header=self._header(time_ns),
            joint_names=list(group.joints),
            desired=self._point(desired, 0),
            actual=self._point(actual, 0),
            error=self._point(error, 0),
            multi_dof_joint_names=[],
            **{f"multi_dof_{name}": self._no_dofs() for name in ("desired", "actual", "error")},
        )
        goal = types["unique_identifier_msgs/msg/UUID"](uuid=np.zeros(16, np.uint8))
        return types[f"{kind}Message"](goal_id=goal, feedback=feedback)

    def _no_dofs(self) -> Any:
        kind = "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint"
        return self._make(kind, transforms=[], velocities=[], accelerations=[], time_from_start=self._duration(0))

    def _trajectory(self, group: ActionGroup, actions: np.ndarray) -> Any:
        """One trajectory through all actions, its points at the frames: the controller is there exactly then."""
        points = [self._point(action, self.ticks.at(k + 1) - self.ticks.at(0)) for k, action in enumerate(actions)]
        # A stamp of zero means "begin when you get it", which also holds when the bag is played at another time.
        return self._make(
            "trajectory_msgs/msg/JointTrajectory", header=self._header(0), joint_names=list(group.joints), points=points
        )

    def _point(self, positions: np.ndarray, time_ns: int) -> Any:
        none = np.empty(0)
        return self._make(
            "trajectory_msgs/msg/JointTrajectoryPoint",
            positions=positions,
            velocities=none,
            accelerations=none,
            effort=none,
            time_from_start=self._duration(time_ns),
        )

    def _duration(self, ns: int) -> Any:
        return self._make("builtin_interfaces/msg/Duration", sec=ns // 10**9, nanosec=ns % 10**9)


def _columns(values: np.ndarray, names: Sequence[str], wanted: Sequence[str]) -> np.ndarray | None:
    places = [list(names).index(name) for name in wanted if name in names]
    return np.ascontiguousarray(values[:, places], np.float64) if len(places) == len(wanted) else None


def _rates(positions: np.ndarray, fps: int) -> np.ndarray:
    """Velocities (N, J) by differences; zero for one frame alone."""
    return (
        np.ascontiguousarray(np.gradient(positions, axis=0)) * fps if len(positions) > 1 else np.zeros_like(positions)
    )
