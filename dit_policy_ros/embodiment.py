"""What the robot is: cameras, state, action groups with their limits, fps. One YAML file, read strictly.

The converter, the policy node and the simulator read the same file, and a checkpoint carries a copy of it,
so what a policy was trained on is what it gets when it runs. A mistake in the file is reported with its file,
key and what was expected, all mistakes at once; nothing has a default.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

T = TypeVar("T")

TRANSPORTS = ("raw", "compressed")
INTERFACES = ("trajectory", "follow_joint_trajectory", "position")
STATE = "state"  # the state's stream name beside the cameras' names, so no camera may be called that

_IMAGE_TYPES = {"raw": "sensor_msgs/msg/Image", "compressed": "sensor_msgs/msg/CompressedImage"}
# Of each interface what is appended to its topic for recording, and the type there.
_COMMAND_TOPICS = {
    "trajectory": ("", "trajectory_msgs/msg/JointTrajectory"),
    "follow_joint_trajectory": (
        "/_action/feedback",
        "control_msgs/action/FollowJointTrajectory_FeedbackMessage",
    ),
    "position": ("", "std_msgs/msg/Float64MultiArray"),
}

_TOPIC = re.compile(r"[/~]?/?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*")
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class EmbodimentError(ValueError):
    """The description is wrong; the message lists every problem with file, key, finding and expectation."""


@dataclass(frozen=True)
class Camera:
    """One camera: `topic` carries sensor_msgs/Image ("raw") or CompressedImage ("compressed") of this size.

    `max_age` in seconds: how old an image may be at the moment it is used.
    """

    name: str
    topic: str
    transport: str
    width: int
    height: int
    max_age: float


@dataclass(frozen=True)
class JointLimits:
    """Limits of one joint: `lower` and `upper` in rad, `velocity` in rad/s, `acceleration` in rad/s^2."""

    lower: float
    upper: float
    velocity: float
    acceleration: float


@dataclass(frozen=True)
class State:
    """The measured joints of `observation.state`, in this order, from a sensor_msgs/JointState topic."""

    topic: str
    joints: tuple[str, ...]
    max_age: float


@dataclass(frozen=True)
class ActionGroup:
    """Joints commanded through one controller, in the order of the action vector.

    What `topic` is, is said by `interface`: "trajectory", a joint_trajectory_controller's `~/joint_trajectory`;
    "follow_joint_trajectory", the name of its action `~/follow_joint_trajectory`; "position", a
    std_msgs/Float64MultiArray of the joints' positions in this order, as a JointGroupPositionController takes.
    """

    name: str
    topic: str
    interface: str
    joints: dict[str, JointLimits]


@dataclass(frozen=True)
class Embodiment:
    """A robot as the policy sees it. `fps` is the rate, in Hz, of observation steps and of action steps.

    `max_camera_skew` in seconds: how far apart the header stamps of the images of one frame may be.
    """

    name: str
    fps: int
    instruction_topic: str
    cameras: tuple[Camera, ...]
    max_camera_skew: float
    state: State
    action_groups: tuple[ActionGroup, ...]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file. Raises EmbodimentError, also when the file cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EmbodimentError(f"embodiment {path} cannot be read: {error}") from error
        return cls.from_yaml(text, str(path))

    @classmethod
    def from_yaml(cls, text: str, source: str) -> Self:
        """Read YAML text; `source` names it in errors. Raises EmbodimentError listing every problem found."""
        try:
            document = yaml.load(text, Loader=_UniqueKeyLoader)
        except yaml.YAMLError as error:
            raise EmbodimentError(f"embodiment {source} is not valid YAML: {error}") from error
        problems: list[str] = []
        embodiment = cls._read(_Reader(document, "", problems))
        if problems:
            listed = "".join(f"\n  {problem}" for problem in problems)
            raise EmbodimentError(f"embodiment {source}: {len(problems)} problem(s){listed}")
        return embodiment

    @classmethod
    def _read(cls, root: _Reader) -> Self:
        root.expect("name", "fps", "instruction", "cameras", "max_camera_skew", "state", "action_groups")
        instruction = root.mapping("instruction")
        instruction.expect("topic")
        state = root.mapping("state")
        state.expect("topic", "joints", "max_age")
        embodiment = cls(
            name=root.text("name"),
            fps=root.integer("fps"),
            instruction_topic=instruction.topic("topic"),
            cameras=tuple(_read_camera(name, camera) for name, camera in root.named_mappings("cameras")),
            max_camera_skew=root.positive("max_camera_skew"),
            state=State(state.topic("topic"), state.joint_list("joints"), state.positive("max_age")),
            action_groups=tuple(_read_group(name, group) for name, group in root.named_mappings("action_groups")),
        )
        _check_topics(embodiment, root.problems)
        _check_action_joints(embodiment, root.problems)
        return embodiment

    def to_yaml(self) -> str:
        """The description as YAML that `from_yaml` reads back to an equal Embodiment."""
        return yaml.safe_dump(self._document(), sort_keys=False, default_flow_style=None, width=120)

    def differences(self, other: Self) -> list[str]:
        """Where the two differ, one line each: "cameras.wrist.width: 128 here, 96 there"; empty if equal."""
        lines = _compare(self._document(), other._document())
        if not lines and self.action_joints != other.action_joints:
            lines.append(
                "order of the action joints: "
                f"{', '.join(self.action_joints)} here, {', '.join(other.action_joints)} there"
            )
        return lines

    def incompatibilities(self, other: Self) -> list[str]:
        """Where a policy trained on `other` does not fit this robot, one line each; empty if it fits.

        That is the name, fps, the cameras' names and sizes, and the joints of state and action with their order. All
        else (topics, transports, ages, skew, limits, interfaces) is the deployment's own business: see `differences`.
        """
        return _compare(self._trained_on(), other._trained_on())

    @property
    def topics(self) -> dict[str, str]:
        """Every topic to record of this robot, and its type: {"joint_states": "sensor_msgs/msg/JointState", ...}.

        The goals of an action are a service's and no topic; its feedback, which tells the references and the measured
        joints, stands for them. It is a hidden topic (`ros2 bag record --include-hidden-topics`).
        """
        topics = {camera.topic: _IMAGE_TYPES[camera.transport] for camera in self.cameras}
        topics |= {self.state.topic: "sensor_msgs/msg/JointState", self.instruction_topic: "std_msgs/msg/String"}
        for group in self.action_groups:
            suffix, kind = _COMMAND_TOPICS[group.interface]
            topics[group.topic + suffix] = kind
        return topics

    @property
    def action_joints(self) -> tuple[str, ...]:
        """The joints of the action vector, in its order: all groups, one after the other."""
        return tuple(joint for group in self.action_groups for joint in group.joints)

    @property
    def limits(self) -> dict[str, JointLimits]:
        """The limits of every action joint, in the order of the action vector."""
        return {joint: limits for group in self.action_groups for joint, limits in group.joints.items()}

    @property
    def action_state_indices(self) -> list[int] | None:
        """Where each action joint stands in the state vector; None if the state lacks one of them."""
        places = {joint: index for index, joint in enumerate(self.state.joints)}
        indices = [places.get(joint) for joint in self.action_joints]
        return None if None in indices else [index for index in indices if index is not None]

    def _document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "fps": self.fps,
            "instruction": {"topic": self.instruction_topic},
            "cameras": {
                camera.name: {
                    "topic": camera.topic,
                    "transport": camera.transport,
                    "width": camera.width,
                    "height": camera.height,
                    "max_age": camera.max_age,
                }
                for camera in self.cameras
            },
            "max_camera_skew": self.max_camera_skew,
            "state": {
                "topic": self.state.topic,
                "joints": list(self.state.joints),
                "max_age": self.state.max_age,
            },
            "action_groups": {
                group.name: {
                    "topic": group.topic,
                    "interface": group.interface,
                    "joints": {
                        joint: {
                            "position": [limits.lower, limits.upper],
                            "velocity": limits.velocity,
                            "acceleration": limits.acceleration,
                        }
                        for joint, limits in group.joints.items()
                    },
                }
                for group in self.action_groups
            },
        }

    def _trained_on(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "fps": self.fps,
            "cameras": {camera.name: {"width": camera.width, "height": camera.height} for camera in self.cameras},
            "state": {"joints": ", ".join(self.state.joints)},
            "action joints": ", ".join(self.action_joints),
        }


def _read_camera(name: str, camera: _Reader) -> Camera:
    camera.expect("topic", "transport", "width", "height", "max_age")
    if name == STATE:
        camera.complain(
            "",
            f"found a camera called '{STATE}', expected another name: the joints have it",
        )
    return Camera(
        name=name,
        topic=camera.topic("topic"),
        transport=camera.choice("transport", TRANSPORTS),
        width=camera.integer("width"),
        height=camera.integer("height"),
        max_age=camera.positive("max_age"),
    )


def _read_group(name: str, group: _Reader) -> ActionGroup:
    group.expect("topic", "interface", "joints")
    interface = group.choice("interface", INTERFACES)
    limits = {joint: _read_limits(reader) for joint, reader in group.named_mappings("joints", identifiers=False)}
    return ActionGroup(name, group.topic("topic"), interface, limits)


def _read_limits(joint: _Reader) -> JointLimits:
    joint.expect("position", "velocity", "acceleration")
    lower, upper = joint.interval("position")
    return JointLimits(lower, upper, joint.positive("velocity"), joint.positive("acceleration"))


def _check_topics(embodiment: Embodiment, problems: list[str]) -> None:
    inputs = [("instruction", embodiment.instruction_topic), (STATE, embodiment.state.topic)]
    inputs += [(f"cameras.{camera.name}", camera.topic) for camera in embodiment.cameras]
    _complain_of_twins([(f"{key}.topic", topic) for key, topic in inputs], "a topic of its own", problems)
    commands = [(f"action_groups.{group.name}.topic", group.topic) for group in embodiment.action_groups]
    _complain_of_twins(commands, "a controller of its own", problems)


def _check_action_joints(embodiment: Embodiment, problems: list[str]) -> None:
    joints = [
        (f"action_groups.{group.name}.joints.{joint}", joint)
        for group in embodiment.action_groups
        for joint in group.joints
    ]
    _complain_of_twins(joints, "each joint in one group only", problems)


def _complain_of_twins(entries: list[tuple[str, str]], expected: str, problems: list[str]) -> None:
    first: dict[str, str] = {}
    for key, value in entries:
        if value and value in first:
            problems.append(f"{key}: found '{value}', which {first[value]} has already, expected {expected}")
        first.setdefault(value, key)


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def _compare(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    here, there = _flatten(here), _flatten(there)
    keys = [*here, *(key for key in there if key not in here)]
    return [
        f"{key}: {here.get(key, _ABSENT)} here, {there.get(key, _ABSENT)} there"
        for key in keys
        if here.get(key, _ABSENT) != there.get(key, _ABSENT)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in value.items():
        flat |= _flatten(child, f"{prefix}.{key}" if prefix else key)
    return flat


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a second joint of one name would vanish."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key '{key}' stands twice, first in line {seen[key].line + 1}",
                    key_node.start_mark,
                )
            if isinstance(key, str):
                seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep)


class _Reader:
    """One mapping of the document; it notes a mistake under its dotted key and goes on with a stand-in."""

    def __init__(self, value: Any, key: str, problems: list[str]) -> None:
        self.problems = problems
        self._key = key
        self._broken = value is _ABSENT
        if not isinstance(value, dict) and value is not _ABSENT:
            self.complain("", f"found {_described(value)}, expected a mapping of keys to values")
            self._broken = True
        self._values: dict[Any, Any] = value if isinstance(value, dict) else {}

    def complain(self, key: str, problem: str) -> None:
        self.problems.append(f"{self._dotted(key) or 'the whole file'}: {problem}")

    def expect(self, *keys: str) -> None:
        """Note unknown and missing keys, a likely misspelling as one problem."""
        if self._broken:
            return
        missing = [key for key in keys if key not in self._values]
        for key in self._values:
            if key in keys:
                continue
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            self.complain(str(key), f"unknown key, expected one of {', '.join(keys)}{hint}")
        for key in missing:
            self.complain(key, "missing, expected this key")

    def mapping(self, key: str) -> _Reader:
        return _Reader(self._values.get(key, _ABSENT), self._dotted(key), self.problems)

    def named_mappings(self, key: str, identifiers: bool = True) -> list[tuple[str, _Reader]]:
        """The children of a mapping whose keys the user chooses; it must have one at least."""
        parent = self.mapping(key)
        if not parent._broken and not parent._values:
            parent.complain("", "found an empty mapping, expected one entry at least")
        children = []
        for name in parent._values:
            if not isinstance(name, str) or not name:
                parent.complain(str(name), f"found {_described(name)} as a name, expected text (put it in quotes)")
            elif identifiers and not _IDENTIFIER.fullmatch(name):
                parent.complain(name, "expected a name of letters, digits and underscores, a letter first")
            else:
                children.append((name, parent.mapping(name)))
        return children

    def text(self, key: str) -> str:
        return self._value(key, lambda value: isinstance(value, str) and value.strip() != "", "a text", "")

    def topic(self, key: str) -> str:
        def valid(value: Any) -> bool:
            return isinstance(value, str) and _TOPIC.fullmatch(value) is not None

        return self._value(key, valid, "a topic's name, such as wrist_camera/image_raw", "")

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        return self._value(key, lambda value: value in choices, " or ".join(choices), choices[0])

    def integer(self, key: str) -> int:
        def valid(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        return self._value(key, valid, "a whole number above 0", 1)

    def positive(self, key: str) -> float:
        return float(self._value(key, lambda value: _is_number(value) and value > 0, "a finite number above 0", 1.0))

    def interval(self, key: str) -> tuple[float, float]:
        def valid(value: Any) -> bool:
            return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]

        lower, upper = self._value(key, valid, "two finite numbers [lower, upper] with lower < upper", (0.0, 1.0))
        return float(lower), float(upper)

    def joint_list(self, key: str) -> tuple[str, ...]:
        def valid(value: Any) -> bool:
            return isinstance(value, list) and value != [] and all(isinstance(name, str) and name for name in value)

        joints: list[str] = self._value(key, valid, "a list of one joint name or more", [])
        repeated = sorted({joint for joint in joints if joints.count(joint) > 1})
        if repeated:
            self.complain(key, f"found {', '.join(repeated)} more than once, expected each joint once")
        return tuple(joints)

    def _value(self, key: str, valid: Callable[[Any], bool], expected: str, stand_in: T) -> T:
        if key not in self._values:
            return stand_in  # noted by expect()
        value = self._values[key]
        if not valid(value):
            self.complain(key, f"found {_described(value)}, expected {expected}")
            return stand_in
        return value

    def _dotted(self, key: str) -> str:
        return ".".join(part for part in (self._key, key) if part)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text '{value}'"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, Mapping):
        return "a mapping"
    return repr(value)
