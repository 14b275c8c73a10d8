"""Numbers out of every kind of message, by way of a bag; what lacks them is named with topic, stamp and joint."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dit_policy_training.conversion.options import Source, VectorOptions
from sampled import sample, seconds
from toy_robot import MORE, START_NS, STORE, Recorded, header, messages

from dit_policy_ros.embodiment import Embodiment

STEP_NS = 40_000_000


def value(number: int, element: int) -> float:
    """What the number-th message says of an element."""
    return 0.25 * number + 100 * element


def with_stream(topic: str, msgtype: str, make: Callable[[int, int], Any], length: float = 1.5) -> list[Recorded]:
    """The recording with make(number, ns) on a topic at 25 Hz, received 3 ms after its stamp."""

    def edit(m: Recorded) -> Iterable[Recorded]:
        if m.topic == "instruction":
            for number in range(round(length * 25)):
                ns = START_NS + number * STEP_NS
                yield Recorded(topic, ns + 3_000_000, make(number, ns), msgtype)
        yield m

    return messages(length, edit=edit)


def latest(t_ns: int, stamped: bool) -> int:
    """The number of the newest message as of an instant."""
    return (t_ns - START_NS - (0 if stamped else 3_000_000)) // STEP_NS


def geometry(name: str, **fields: Any) -> Any:
    return STORE.types[f"geometry_msgs/msg/{name}"](**fields)


def xyz(kind: str, number: int, first: int) -> Any:
    return geometry(kind, **{axis: value(number, first + i) for i, axis in enumerate("xyz")})


def quaternion(number: int, first: int) -> Any:
    return geometry("Quaternion", **{axis: value(number, first + i) for i, axis in enumerate("xyzw")})


def pose(number: int) -> Any:
    return geometry("Pose", position=xyz("Point", number, 0), orientation=quaternion(number, 3))


def twist(number: int) -> Any:
    return geometry("Twist", linear=xyz("Vector3", number, 0), angular=xyz("Vector3", number, 3))


def transform(number: int) -> Any:
    return geometry("Transform", translation=xyz("Vector3", number, 0), rotation=quaternion(number, 3))


def wrench(number: int) -> Any:
    return geometry("Wrench", force=xyz("Vector3", number, 0), torque=xyz("Vector3", number, 3))


def odometry(number: int, ns: int) -> Any:
    covariance = np.zeros(36)
    return STORE.types["nav_msgs/msg/Odometry"](
        header(ns),
        "",
        geometry("PoseWithCovariance", pose=pose(number), covariance=covariance),
        geometry("TwistWithCovariance", twist=twist(number), covariance=covariance),
    )


POSE, TWIST = ["position", "orientation"], ["linear", "angular"]
KINDS: dict[str, tuple[str, list[str], Callable[[int, int], Any], list[int]]] = {
    "pose": ("geometry_msgs/msg/Pose", POSE, lambda n, ns: pose(n), [*range(7)]),
    "stamped pose": (
        "geometry_msgs/msg/PoseStamped",
        ["orientation", "position.z"],
        lambda n, ns: geometry("PoseStamped", header=header(ns), pose=pose(n)),
        [3, 4, 5, 6, 2],
    ),
    "twist": ("geometry_msgs/msg/Twist", TWIST, lambda n, ns: twist(n), [*range(6)]),
    "stamped twist": (
        "geometry_msgs/msg/TwistStamped",
        TWIST,
        lambda n, ns: geometry("TwistStamped", header=header(ns), twist=twist(n)),
        [*range(6)],
    ),
    "transform": (
        "geometry_msgs/msg/Transform",
        ["translation", "rotation"],
        lambda n, ns: transform(n),
        [*range(7)],
    ),
    "stamped transform": (
        "geometry_msgs/msg/TransformStamped",
        ["translation.y", "rotation"],
        lambda n, ns: geometry("TransformStamped", header=header(ns), child_frame_id="", transform=transform(n)),
        [1, 3, 4, 5, 6],
    ),
    "stamped wrench": (
        "geometry_msgs/msg/WrenchStamped",
        ["force", "torque"],
        lambda n, ns: geometry("WrenchStamped", header=header(ns), wrench=wrench(n)),
        [*range(6)],
    ),
    "any path": (
        "nav_msgs/msg/Odometry",
        ["pose.pose.position.y", "twist.twist.angular.z"],
        odometry,
        [1, 5],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_poses_twists_and_transforms_in_state_and_action(embodiment: Embodiment, tmp_path: Path, kind: str) -> None:
    msgtype, fields, make, elements = KINDS[kind]
    stamped = not msgtype.endswith(("/Pose", "/Twist", "/Transform"))
    source = Source("hand/where", fields=fields)
    vectors = VectorOptions(state=[source], action=[source])
    sampled = sample(tmp_path, with_stream("hand/where", msgtype, make), embodiment, vectors=vectors)
    assert len(sampled.rows) > 10
    for row in sampled.rows:
        now, later = (latest(ns, stamped) for ns in (row.stamp_ns, row.stamp_ns + 100_000_000))
        state = row.frame["observation.state"]
        np.testing.assert_array_equal(state[3:], np.float32([value(now, element) for element in elements]))
        np.testing.assert_array_equal(row.action, np.float32([value(later, element) for element in elements]))
    assert {s.stamp for s in sampled.account.streams if s.topic == "hand/where"} == {"header" if stamped else "receive"}


def joint_state(number: int, ns: int, names: tuple[str, ...] = ("finger", "thumb")) -> Any:
    order = np.random.default_rng(number).permutation(len(names))
    return STORE.types["sensor_msgs/msg/JointState"](
        header(ns),
        [names[i] for i in order],
        np.array([value(number, 0), value(number, 1)])[order],
        np.array([value(number, 2), value(number, 3)])[order],
        np.array([value(number, 4), value(number, 5)])[order],
    )


def test_other_joints_by_name_with_all_their_fields(embodiment: Embodiment, tmp_path: Path) -> None:
    source = Source("gripper/state", fields=["effort", "position", "velocity"], joints=["thumb", "finger"])
    recorded = with_stream("gripper/state", "sensor_msgs/msg/JointState", joint_state)
    sampled = sample(tmp_path, recorded, embodiment, vectors=VectorOptions(state=[source]))
    for row in sampled.rows:
        number = latest(row.stamp_ns, stamped=True)
        expected = [value(number, element) for element in (5, 4, 1, 0, 3, 2)]
        np.testing.assert_array_equal(row.frame["observation.state"][3:], np.float32(expected))


def test_a_source_of_joints_interpolated_and_nearest(embodiment: Embodiment, tmp_path: Path) -> None:
    line = Source("gripper/state", joints=["finger"], sampling="interpolate")
    near = Source("gripper/state", joints=["thumb"], sampling="nearest")
    recorded = with_stream("gripper/state", "sensor_msgs/msg/JointState", joint_state)
    for row in sample(tmp_path, recorded, embodiment, vectors=VectorOptions(state=[line, near])).rows:
        place = (row.stamp_ns - START_NS) / STEP_NS
        finger, thumb = row.frame["observation.state"][3:]
        assert finger == pytest.approx(0.25 * place, abs=1e-5)
        assert thumb == value(int(np.floor(place + 0.5)), 1)


def lost(number: int, ns: int) -> Any:
    """From the 20th message on, another joint's name."""
    return joint_state(number, ns, ("finger", "thumb") if number < 20 else ("finger", "index"))


def nan(number: int, ns: int) -> Any:
    return replace(joint_state(number, ns), position=np.array([np.nan, np.nan]))


def twice(number: int, ns: int) -> Any:
    return joint_state(number, ns, ("thumb", "thumb"))


def short(number: int, ns: int) -> Any:
    return replace(joint_state(number, ns), position=np.array([1.0]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lost,
            r"gripper/state, stamp 1700000000\.\d{9}: found no joint 'thumb', only .*index.*; expected all of thumb",
        ),
        (nan, r"gripper/state, stamp 1700000000\.\d{9}: found 'thumb' is nan"),
        (twice, r"gripper/state, stamp .*: found joint 'thumb' twice"),
        (short, r"gripper/state, stamp .*: found 1 values of 'position'; expected 2"),
    ],
)
def test_joints_that_are_not_there_are_named(
    embodiment: Embodiment, tmp_path: Path, make: Callable[[int, int], Any], said: str
) -> None:
    vectors = VectorOptions(state=[Source("gripper/state", joints=["thumb"])])
    with pytest.raises(ValueError, match=said):
        sample(tmp_path, with_stream("gripper/state", "sensor_msgs/msg/JointState", make), embodiment, vectors=vectors)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            Source("hand/pose", fields=["position.w"]),
            r"hand/pose, received at .* s: found no 'w' of 'position.w'.* x, y, z",
        ),
        (Source("hand/pose", fields=["speed"]), r"found no 'speed'.*; expected position, orientation"),
        (Source("hand/pose", fields=["position", "orientation.x"], stamp="header"), "its messages have no header"),
        (
            Source("hand/pose", joints=["thumb"]),
            "joints cannot be taken from geometry_msgs/msg/Pose, only from JointState",
        ),
        (Source("other/pose", fields=["position"]), "no message on other/pose; topics with messages: .*/hand/pose"),
    ],
)
def test_fields_that_a_type_has_not_are_named(
    embodiment: Embodiment, tmp_path: Path, source: Source, said: str
) -> None:
    recorded = with_stream("hand/pose", "geometry_msgs/msg/Pose", lambda n, ns: pose(n))
    with pytest.raises(ValueError, match=said):
        sample(tmp_path, recorded, embodiment, vectors=VectorOptions(state=[source]))


def test_a_field_of_joints_that_a_type_has_not_is_named(embodiment: Embodiment, tmp_path: Path) -> None:
    kind = "control_msgs/msg/GripperCommand"
    recorded = with_stream("gripper/cmd", kind, lambda n, ns: MORE.types[kind](value(n, 0), 1.0))
    vectors = VectorOptions(state=[Source("gripper/cmd", fields=["velocity"], joints=["thumb"])])
    with pytest.raises(ValueError, match=r"gripper/cmd: .*GripperCommand has no 'velocity' of joints, .*max_effort"):
        sample(tmp_path, recorded, embodiment, MORE, vectors=vectors)
    effort = VectorOptions(state=[Source("gripper/cmd", fields=["max_effort"], joints=["thumb"])])
    assert {
        row.frame["observation.state"][3] for row in sample(tmp_path, recorded, embodiment, MORE, vectors=effort).rows
    } == {1}


def test_a_stale_source_is_a_gap(embodiment: Embodiment, tmp_path: Path) -> None:
    recorded = [
        m
        for m in with_stream("hand/pose", "geometry_msgs/msg/Pose", lambda n, ns: pose(n), 3.0)
        if m.topic != "hand/pose" or not 1.0 < seconds(m.receive_ns) < 2.0
    ]
    source = Source("hand/pose", fields=["position"], max_age=0.2)
    sampled = sample(tmp_path, recorded, embodiment, vectors=VectorOptions(state=[source]))
    assert [(gap.stream, gap.kind) for gap in sampled.account.gaps] == [("state 0: hand/pose", "stale")]
    assert len(sampled.episodes) == 2
