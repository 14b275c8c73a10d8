"""A first embodiment file, guessed from recordings, to be edited: each guess says in a comment that it is one."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import yaml

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.conversion.inspection import (
    ARRAY,
    COMPRESSED,
    CONTROLLER_STATE,
    FEEDBACK,
    IMAGE,
    JOINTS,
    STRING,
    TRAJECTORY,
    BagLook,
    Extent,
    TopicLook,
    natural,
)

_USUAL_FPS = (5, 10, 15, 20, 25, 30, 50, 60)
_FEEDBACK_SUFFIX = "/_action/feedback"
_DEPTH = ("16uc1", "32fc1", "mono16", "compresseddepth")
_INSTRUCTIONS = ("instruction", "task", "prompt", "language")
# Words of an image topic that do not tell one camera from another.
_PLAIN = {"image", "raw", "rect", "color", "colour", "rgb", "compressed", "camera", "cam", "sensors", "sensor"}
_POSITION_ROOM = 0.1  # of the range seen, at either side
_LEAST_ROOM = 0.1  # rad
_VELOCITY_ROOM, _ACCELERATION_ROOM = 1.5, 2.0
_LEAST_VELOCITY, _LEAST_ACCELERATION = 0.5, 2.0  # rad/s, rad/s^2: of joints that hardly moved


class GuessError(ValueError):
    """The recordings lack something without which there is no embodiment; says what."""


@dataclass(frozen=True)
class _Group:
    name: str
    topic: str
    interface: str
    joints: tuple[str, ...]
    remark: str


def guess(looks: Sequence[BagLook], name: str) -> str:
    """The YAML of an embodiment that `Embodiment.load` reads, from all recordings. Raises GuessError."""
    cameras, depth = _cameras(looks)
    if not cameras:
        raise GuessError("no bag has a colour image topic, so that there is no camera to describe; record one")
    state = _state(looks)
    limits = _limits([look.topics[state.info.name] for look in looks if state.info.name in look.topics])
    groups = _groups(looks, state)
    fps = _fps(cameras)
    lines = [
        f"# A first description of the robot, guessed from {len(looks)} bag(s). Look at each line with GUESS.",
        "# config/embodiments/sim_arm.yaml explains each key.",
        "",
        f"name: {_text(name)}  # GUESS: give the robot's name",
        "",
        f"fps: {fps}  # GUESS: the slowest camera's rate; 10 is usual for manipulation, and costs less",
        "",
        *_instruction(looks),
        "",
        "cameras:",
        *(line for camera in cameras.items() for line in _camera_lines(*camera)),
        *(
            f"  # {topic} is a depth stream: give it to convert with --config=FILE, see docs/convert.md"
            for topic in depth
        ),
        f"max_camera_skew: {_rounded(2 / min(look.rate for look in cameras.values()))}  # GUESS: two periods",
        "",
        "state:",
        f"  topic: {_topic(state.info.name)}",
        "  joints:  # GUESS: all that are published; leave out what the policy need not know",
        *(f"    - {_text(joint)}" for joint in _state_joints(state, groups)),
        f"  max_age: {_age(state)}  # GUESS: three periods, the largest gap seen is {state.largest_gap:.3f} s",
        "",
        "# GUESS: the limits are what was seen, widened. They guard the robot: write its own, from its data sheet.",
        "action_groups:",
        *(line for group in groups for line in _group_lines(group, limits)),
    ]
    text = "\n".join(lines) + "\n"
    Embodiment.from_yaml(text, "guessed")
    return text


def _text(value: str) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _topic(name: str) -> str:
    """Without the leading slash: relative, so that namespaces and remaps apply on the robot."""
    return name.lstrip("/")


def _rounded(seconds: float) -> float:
    """Up to the next 0.05 s."""
    return math.ceil(round(seconds / 0.05, 6)) * 5 / 100


def _age(look: TopicLook) -> float:
    return _rounded(3 / look.rate) if look.rate else 0.5


def _longest(looks: Sequence[BagLook], *msgtypes: str) -> dict[str, TopicLook]:
    """By topic, the look of the recording that has most of it."""
    found: dict[str, TopicLook] = {}
    for topic in (topic for look in looks for topic in look.of_type(*msgtypes) if topic.read):
        known = found.get(topic.info.name)
        if known is None or topic.read > known.read:
            found[topic.info.name] = topic
    return dict(sorted(found.items()))


def _cameras(looks: Sequence[BagLook]) -> tuple[dict[str, TopicLook], list[str]]:
    """The colour cameras by name, one topic each, raw before compressed; and the topics that are depth."""
    cameras: dict[str, TopicLook] = {}
    depth = []
    base = {}
    for topic, look in sorted(
        _longest(looks, IMAGE, COMPRESSED).items(), key=lambda item: item[1].info.msgtype == COMPRESSED
    ):
        if not look.pictures.kinds:
            continue
        encoding = look.pictures.kinds.most_common(1)[0][0][2].lower()
        if any(word in encoding for word in _DEPTH):
            depth.append(topic)
            continue
        plain = topic.removesuffix("/compressed")
        if plain in base:
            continue
        name = _camera_name(topic)
        while name in cameras or name == "state":
            name += "_2"
        base[plain] = name
        cameras[name] = look
    return cameras, depth


def _camera_name(topic: str) -> str:
    parts = topic.strip("/").split("/")
    words = [[word for word in part.split("_") if word.lower() not in _PLAIN] for part in parts]
    telling = ["_".join(word) for word in words if word]
    name = re.sub(r"[^A-Za-z0-9_]", "_", telling[-1] if telling else "camera")
    return name if name[0].isalpha() else f"camera_{name}"


def _camera_lines(name: str, look: TopicLook) -> list[str]:
    (width, height, kind), count = look.pictures.kinds.most_common(1)[0]
    transport = "compressed" if look.info.msgtype == COMPRESSED else "raw"
    others = look.pictures.kinds.total() - count
    remark = f"  # GUESS: the name. {kind}, {look.rate:.1f} Hz, largest gap {look.largest_gap:.3f} s"
    remark += f"; {others} pictures are of another size or kind" if others else ""
    return [
        f"{remark}",
        f"  {name}: {{topic: {_topic(look.info.name)}, transport: {transport}, width: {width}, height: {height}, "
        f"max_age: {_age(look)}}}",
    ]


def _fps(cameras: dict[str, TopicLook]) -> int:
    slowest = min(look.rate for look in cameras.values())
    if not slowest:
        raise GuessError("a camera sent one picture only, so that its rate cannot be told; record longer")
    return max((fps for fps in _USUAL_FPS if fps <= slowest * 1.05), default=max(1, round(slowest)))


def _instruction(looks: Sequence[BagLook]) -> list[str]:
    texts = _longest(looks, STRING)
    named = [topic for topic in texts if any(word in topic.lower() for word in _INSTRUCTIONS)]
    chosen = named or list(texts)
    if not chosen:
        return [
            "# GUESS: no bag has a std_msgs/String topic. Give the task with convert's --episodes.task.",
            "instruction: {topic: instruction}",
        ]
    return [f"instruction: {{topic: {_topic(chosen[0])}}}  # GUESS: by its name and type"]


def _state(looks: Sequence[BagLook]) -> TopicLook:
    topics = _longest(looks, JOINTS)
    measured = {name: look for name, look in topics.items() if "command" not in name and "desired" not in name}
    if not (measured or topics):
        raise GuessError("no bag has a sensor_msgs/JointState topic, so that there is no state to describe")
    # More joints first: a broadcaster of the whole robot rather than a gripper's driver.
    return max((measured or topics).values(), key=lambda look: (len(look.joints.names), look.read))


def _state_joints(state: TopicLook, groups: Sequence[_Group]) -> list[str]:
    """The commanded joints in their order, then the others."""
    commanded = [joint for group in groups for joint in group.joints if joint in state.joints.names]
    return commanded + sorted((name for name in state.joints.names if name not in commanded), key=natural)


def _groups(looks: Sequence[BagLook], state: TopicLook) -> list[_Group]:
    groups: list[_Group] = []
    taken: set[str] = set()

    def add(topic: str, interface: str, joints: tuple[str, ...], remark: str) -> None:
        free = tuple(joint for joint in joints if joint not in taken)
        if free == joints and joints:
            groups.append(_Group(_group_name(topic, groups), topic, interface, joints, remark))
            taken.update(joints)

    for topic, look in _longest(looks, TRAJECTORY).items():
        add(topic, "trajectory", look.joints.names, "GUESS: by the type of its topic")
    for topic, look in _longest(looks, FEEDBACK).items():
        action = topic.removesuffix(_FEEDBACK_SUFFIX)
        add(action, "follow_joint_trajectory", look.joints.names, "GUESS: by its action's feedback")
    for topic, look in _longest(looks, ARRAY).items():
        size = look.sizes.most_common(1)[0][0]
        rest = tuple(name for name in state.joints.names if name not in taken)
        if size and size <= len(rest):
            remark = f"GUESS: its {size} values have no names; which joints they are, and in what order, is not known"
            add(topic, "position", rest[:size], remark)
    for topic, look in _longest(looks, CONTROLLER_STATE).items():
        commands = topic.rpartition("/")[0] + "/joint_trajectory"
        add(commands, "trajectory", look.joints.names, f"GUESS: by {topic}; no bag has the commands themselves")
    if not groups:
        remark = "GUESS: no bag has commands; convert with --vectors.action_from=next_state"
        add("arm_controller/joint_trajectory", "trajectory", state.joints.names, remark)
    return groups


def _group_name(topic: str, groups: Sequence[_Group]) -> str:
    first = topic.strip("/").split("/")
    word = (first[-2] if len(first) > 1 else first[0]).removesuffix("_controller")
    name = re.sub(r"[^A-Za-z0-9_]", "_", word)
    name = name if name and name[0].isalpha() else "group"
    return f"{name}_{len(groups) + 1}" if any(group.name == name for group in groups) else name


def _group_lines(group: _Group, limits: dict[str, str]) -> list[str]:
    unseen = "{position: [-3.14, 3.14], velocity: 1.0, acceleration: 5.0}  # GUESS: not in the joint states"
    return [
        f"  {group.name}:  # {group.remark}",
        f"    topic: {_topic(group.topic)}",
        f"    interface: {group.interface}",
        "    joints:",
        *(f"      {_text(joint)}: {limits.get(joint, unseen)}" for joint in group.joints),
    ]


def _limits(looks: Sequence[TopicLook]) -> dict[str, str]:
    """By joint: what was seen in all recordings, widened, as YAML."""
    seen: dict[str, list[Extent]] = {}
    for look in looks:
        for name, extent in look.joints.extents.items():
            seen.setdefault(name, []).append(extent)
    return {name: _limit(np.array(extents)) for name, extents in seen.items()}


def _limit(extents: np.ndarray) -> str:
    lower, upper = extents[:, 0].min(), extents[:, 1].max()
    room = max(_LEAST_ROOM, _POSITION_ROOM * (upper - lower))
    velocity = max(_LEAST_VELOCITY, _VELOCITY_ROOM * extents[:, 2].max())
    acceleration = max(_LEAST_ACCELERATION, _ACCELERATION_ROOM * extents[:, 3].max())
    return (
        f"{{position: [{lower - room:.3f}, {upper + room:.3f}], velocity: {velocity:.2f}, "
        f"acceleration: {acceleration:.1f}}}  # GUESS: seen {lower:.3f} to {upper:.3f}"
    )
