"""What an embodiment asks for and a recording does not have."""

from collections.abc import Iterator

from dit_policy_ros.embodiment import Camera, Embodiment
from dit_policy_training.conversion.inspection import BagLook, TopicLook
from dit_policy_training.conversion.layout import command_topic


def lacks(look: BagLook, embodiment: Embodiment) -> list[str]:
    """One sentence for each thing; empty if the recording has all that the embodiment names."""
    return list(_lacks(look, embodiment))


def _lacks(look: BagLook, embodiment: Embodiment) -> Iterator[str]:
    by_name = {name.lstrip("/"): topic for name, topic in look.topics.items()}
    for topic, msgtype in embodiment.topics.items():
        found = by_name.get(topic.lstrip("/"))
        if found is None or not found.info.count:
            yield f"no message on {topic} ({msgtype})"
        elif found.info.msgtype != msgtype:
            yield f"{topic} has messages of {found.info.msgtype}, expected {msgtype}"
    for camera in embodiment.cameras:
        if (found := by_name.get(camera.topic.lstrip("/"))) is not None:
            yield from _other_pictures(found, camera)
    if (found := by_name.get(embodiment.state.topic.lstrip("/"))) is not None:
        yield from _no_joints(found, embodiment.state.joints)
        yield from _gap(found, embodiment.state.max_age)
    for group in embodiment.action_groups:
        topic = command_topic(group.topic, group.interface)
        if (found := by_name.get(topic.lstrip("/"))) is not None and found.joints.names:
            yield from _no_joints(found, tuple(group.joints))


def _other_pictures(topic: TopicLook, camera: Camera) -> Iterator[str]:
    for (width, height, kind), count in topic.pictures.kinds.items():
        if (width, height) != (camera.width, camera.height):
            found = f"{count} pictures of {width}x{height} ({kind})"
            yield f"{camera.topic} has {found}, expected {camera.width}x{camera.height}"
    yield from _gap(topic, camera.max_age)


def _no_joints(topic: TopicLook, joints: tuple[str, ...]) -> Iterator[str]:
    if missing := [joint for joint in joints if joint not in topic.joints.names]:
        there = ", ".join(topic.joints.names) or "no joint"
        yield f"{topic.info.name} has no {', '.join(missing)}, only {there}"


def _gap(topic: TopicLook, max_age: float) -> Iterator[str]:
    if topic.largest_gap > max_age:
        yield f"{topic.info.name} has a gap of {topic.largest_gap:.3f} s, allowed are {max_age} s (max_age)"
