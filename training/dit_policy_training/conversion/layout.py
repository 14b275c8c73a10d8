"""What the rows of a dataset look like: which vectors and pictures, their names and sizes, from the options alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Self

from dit_policy_ros.embodiment import STATE, TRANSPORTS, Embodiment
from dit_policy_training.conversion.options import (
    ACTION_MODES,
    ACTIONS_FROM,
    ConvertConfig,
    DepthCamera,
    OptionError,
    Source,
    VectorOptions,
)

JOINT_FIELDS = ("position", "velocity", "effort")
# Shorthands for the fields of geometry_msgs, where no joints are named.
_GROUPS = dict.fromkeys(("position", "translation", "linear", "angular", "force", "torque"), "xyz")
_GROUPS |= dict.fromkeys(("orientation", "rotation"), "xyzw")


@dataclass(frozen=True)
class Layout:
    """A row's shape.

    cameras: {feature key: (height, width)}, RGB; depth: {feature key: its camera}; names of the state's and the
    action's elements in order: a joint's position is named by the joint alone, all else `<joint>.<field>` or
    `<end of the topic>.<field>`. topics: all that are read, as the options name them.
    """

    fps: int
    robot_type: str
    cameras: dict[str, tuple[int, int]]
    depth: dict[str, DepthCamera]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    topics: tuple[str, ...]

    @classmethod
    def of(cls, config: ConvertConfig, embodiment: Embodiment) -> Self:
        """Raises OptionError for options that contradict one another or the embodiment."""
        embodiment = at_fps(embodiment, config.fps)
        vectors = config.vectors
        _check_durations(config)
        _check_vectors(vectors, embodiment)
        clash = [name for name in config.depth if name in {STATE, *(camera.name for camera in embodiment.cameras)}]
        if clash:
            raise OptionError(f"--depth: '{clash[0]}' is a name that the embodiment has already; give it another")
        for name, camera in config.depth.items():
            _check_depth(name, camera)
        for option, sources in (("state", vectors.state), ("action", vectors.action)):
            for source in sources:
                _check_source(f"--vectors.{option}", source)
        state = (*joint_field_names(embodiment.state.joints, vectors.state_fields), *source_names(vectors.state))
        action = source_names(vectors.action) if vectors.action else embodiment.action_joints
        for option, names in (("state", state), ("action", action)):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise OptionError(f"--vectors.{option}: {', '.join(twice)} more than once; name each element once")
        return cls(
            fps=embodiment.fps,
            robot_type=embodiment.name,
            cameras={image_key(camera.name): (camera.height, camera.width) for camera in embodiment.cameras},
            depth={image_key(name): camera for name, camera in config.depth.items()},
            state_names=state,
            action_names=action,
            topics=tuple(dict.fromkeys(_topics(config, embodiment))),
        )


def image_key(name: str) -> str:
    """The feature key of a camera."""
    return f"observation.images.{name}"


def at_fps(embodiment: Embodiment, fps: int | None) -> Embodiment:
    """The embodiment at another rate; None: its own. Raises OptionError for less than 1."""
    if fps is not None and fps < 1:
        raise OptionError(f"--fps={fps}: expected 1 or more")
    return embodiment if fps is None else replace(embodiment, fps=fps)


def command_topic(topic: str, interface: str) -> str:
    """The recorded topic that tells what a controller of an embodiment's action group was told."""
    return f"{topic}/_action/feedback" if interface == "follow_joint_trajectory" else topic


def joint_field_names(joints: Sequence[str], fields: Sequence[str]) -> tuple[str, ...]:
    """Names of vectors of all joints' first field, then all joints' second, ...: `lift`, `lift.velocity`."""
    return tuple(joint if field == "position" else f"{joint}.{field}" for field in fields for joint in joints)


def source_fields(source: Source) -> tuple[str, ...]:
    """A source's fields one by one, shorthands such as `orientation` written out."""
    if source.joints:
        return tuple(source.fields or ["position"])
    return tuple(
        path
        for field in source.fields
        for path in ([f"{field}.{axis}" for axis in _GROUPS[field]] if field in _GROUPS else [field])
    )


def source_names(sources: Sequence[Source]) -> tuple[str, ...]:
    """The elements' names of some sources, one source after the other."""
    ends = Counter(_last_part(source.topic) for source in sources if not source.joints)
    names: list[str] = []
    for source in sources:
        if source.joints:
            names += joint_field_names(source.joints, source_fields(source))
        else:
            end = _last_part(source.topic)
            prefix = end if ends[end] == 1 else source.topic.strip("/").replace("/", ".")
            names += [f"{prefix}.{path}" for path in source_fields(source)]
    return tuple(names)


def _last_part(topic: str) -> str:
    return topic.rstrip("/").rsplit("/", 1)[-1]


def _topics(config: ConvertConfig, embodiment: Embodiment) -> list[str]:
    vectors = config.vectors
    topics = [camera.topic for camera in embodiment.cameras] + [embodiment.state.topic]
    if vectors.action:
        topics += [source.topic for source in vectors.action]
    elif vectors.action_from == "commands":
        topics += [command_topic(group.topic, group.interface) for group in embodiment.action_groups]
    topics += [embodiment.instruction_topic]
    return topics + [camera.topic for camera in config.depth.values()] + [source.topic for source in vectors.state]


def _check_durations(config: ConvertConfig) -> None:
    episodes = config.episodes
    numbers = {"--time.max_skew": config.time.max_skew, "--episodes.min_seconds": episodes.min_seconds}
    numbers |= {"--episodes.idle_speed": episodes.idle_speed, "--episodes.idle_margin": episodes.idle_margin}
    for name, value in numbers.items():
        if not 0 <= value < inf:
            raise OptionError(f"{name}={value}: expected 0 or more")


def _check_vectors(vectors: VectorOptions, embodiment: Embodiment) -> None:
    fields = vectors.state_fields
    if "position" not in fields or set(fields) - set(JOINT_FIELDS) or len(set(fields)) != len(fields):
        expected = f"position, and of {', '.join(JOINT_FIELDS[1:])} what else is wanted, each once"
        raise OptionError(f"--vectors.state_fields={fields}: expected {expected}")
    if vectors.action_from not in ACTIONS_FROM:
        raise OptionError(f"--vectors.action_from={vectors.action_from}: expected {' or '.join(ACTIONS_FROM)}")
    if vectors.action_mode not in ACTION_MODES:
        raise OptionError(f"--vectors.action_mode={vectors.action_mode}: expected {' or '.join(ACTION_MODES)}")
    if vectors.action_from == "next_state" and vectors.action:
        raise OptionError("--vectors.action names sources, but --vectors.action_from=next_state takes none; give one")
    names = source_names(vectors.action) if vectors.action else embodiment.action_joints
    unmeasured = [name for name in names if name not in embodiment.state.joints]
    if unmeasured and vectors.action_from == "next_state":
        raise OptionError(
            f"--vectors.action_from=next_state: the state does not measure {', '.join(unmeasured)}; add it to "
            "`state.joints` of the embodiment"
        )
    if unmeasured and vectors.action_mode == "relative":
        raise OptionError(
            f"--vectors.action_mode=relative: the state does not measure {', '.join(unmeasured)}, to which the action "
            "would be relative; add it to `state.joints` of the embodiment, or take absolute actions"
        )


def _check_depth(name: str, camera: DepthCamera) -> None:
    if camera.transport not in TRANSPORTS:
        raise OptionError(f"--depth: {name}.transport is '{camera.transport}', expected {' or '.join(TRANSPORTS)}")
    if min(camera.width, camera.height) < 1 or camera.max_age <= 0:
        raise OptionError(f"--depth: {name}: expected width, height and max_age above 0")
    if not 0 <= camera.depth_min < camera.depth_max:
        found = f"{camera.depth_min} and {camera.depth_max}"
        raise OptionError(f"--depth: {name}: depth_min and depth_max are {found}, expected 0 <= depth_min < depth_max")


def _check_source(option: str, source: Source) -> None:
    where = f"{option}: {source.topic or 'a source without a topic'}"
    if not source.topic:
        raise OptionError(f"{where}: expected its topic")
    if not source.joints and not source.fields:
        raise OptionError(
            f"{where}: neither joints nor fields are given; name `joints`, or `fields` such as [position, orientation] "
            "of a pose, [linear, angular] of a twist, [translation, rotation] of a transform"
        )
    if source.max_age <= 0:
        raise OptionError(f"{where}: max_age is {source.max_age}, expected more than 0 s")
    if source.stamp not in ("", "header", "receive"):
        raise OptionError(f"{where}: stamp is '{source.stamp}', expected header or receive")
    allowed = ("as_of", "nearest", "interpolate") if source.joints else ("as_of", "nearest")
    if source.sampling not in allowed:
        raise OptionError(
            f"{where}: sampling is '{source.sampling}', expected {' or '.join(allowed)}; only joints are interpolated"
        )
