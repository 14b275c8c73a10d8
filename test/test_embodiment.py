"""The robot description: what is read, and that every mistake is named with file, key, finding and expectation."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_policy_ros.embodiment import Embodiment, EmbodimentError, JointLimits

SIM_ARM = Path(__file__).parents[1] / "config" / "embodiments" / "sim_arm.yaml"

TWO_ARMS = """
name: two_arms
fps: 20
instruction: {topic: instruction}
cameras:
  top: {topic: top/image_raw, transport: raw, width: 64, height: 48, max_age: 0.3}
max_camera_skew: 0.1
state: {topic: joint_states, joints: [a, b, g], max_age: 0.2}
action_groups:
  hand:
    topic: hand_controller/commands
    interface: position
    joints:
      g: {position: [0, 0.04], velocity: 0.2, acceleration: 1}
  arm:
    topic: arm_controller/joint_trajectory
    interface: trajectory
    joints:
      b: {position: [-1.0, 1.0], velocity: 2.0, acceleration: 8.0}
      a: {position: [-2.0, 2.0], velocity: 1.0, acceleration: 4.0}
"""


def problems_of(text: str) -> list[str]:
    with pytest.raises(EmbodimentError) as caught:
        Embodiment.from_yaml(text, "robot.yaml")
    first, *lines = str(caught.value).split("\n")
    assert "robot.yaml" in first
    return [line.strip() for line in lines]


def edited(old: str, new: str) -> str:
    assert TWO_ARMS.count(old) == 1
    return TWO_ARMS.replace(old, new)


def test_the_demo_arm_is_a_panda() -> None:
    arm = Embodiment.load(SIM_ARM)
    assert arm.fps == 10
    assert arm.action_joints == arm.state.joints == tuple(f"panda_joint{i}" for i in range(1, 8))
    assert [camera.transport for camera in arm.cameras] == ["raw", "compressed"]
    assert arm.limits["panda_joint4"] == JointLimits(-3.0718, -0.0698, 2.175, 12.5)
    assert arm.action_state_indices == [0, 1, 2, 3, 4, 5, 6]
    assert [group.interface for group in arm.action_groups] == ["trajectory"]
    assert arm.max_camera_skew == 0.2


def test_the_action_vector_follows_the_groups_in_the_files_order() -> None:
    robot = Embodiment.from_yaml(TWO_ARMS, "robot.yaml")
    assert robot.action_joints == ("g", "b", "a")
    assert robot.action_state_indices == [2, 1, 0]
    assert list(robot.limits) == ["g", "b", "a"]
    assert robot.limits["g"].upper == 0.04


def test_an_action_joint_outside_the_state_has_no_index() -> None:
    robot = Embodiment.from_yaml(edited("[a, b, g]", "[a, b]"), "robot.yaml")
    assert robot.action_state_indices is None


@pytest.mark.parametrize("text", [TWO_ARMS, SIM_ARM.read_text()], ids=["two_arms", "sim_arm"])
def test_yaml_round_trip(text: str) -> None:
    robot = Embodiment.from_yaml(text, "robot.yaml")
    again = Embodiment.from_yaml(robot.to_yaml(), "again.yaml")
    assert again == robot
    assert again.action_joints == robot.action_joints
    assert robot.differences(again) == []


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("fps: 20", "fsp: 20", "fsp", ["unknown key", "did you mean 'fps'"]),
        ("name: two_arms\n", "", "name", ["missing"]),
        ("fps: 20", "fps: 0", "fps", ["found 0", "whole number above 0"]),
        ("fps: 20", "fps: true", "fps", ["truth value true", "whole number"]),
        ("fps: 20", "fps: 20.0", "fps", ["found 20.0", "whole number"]),
        ("width: 64", "width: '64'", "cameras.top.width", ["the text '64'", "whole number"]),
        ("height: 48", "height: -48", "cameras.top.height", ["found -48"]),
        ("transport: raw", "transport: theora", "cameras.top.transport", ["'theora'", "raw or compressed"]),
        ("max_age: 0.3", "max_age: .nan", "cameras.top.max_age", ["nan", "finite number above 0"]),
        ("max_age: 0.3", "max_age: .inf", "cameras.top.max_age", ["inf", "finite number above 0"]),
        ("max_age: 0.3", "max_age: 1" + "0" * 400, "cameras.top.max_age", ["finite number above 0"]),
        ("max_age: 0.3", "max_age: 3e-1x", "cameras.top.max_age", ["the text '3e-1x'"]),
        ("top/image_raw", "top//image raw", "cameras.top.topic", ["topic's name"]),
        ("  top: {topic: top", "  state: {topic: top", "cameras.state", ["expected another name"]),
        ("  top: {topic: top", "  to-p: {topic: top", "cameras.to-p", ["letters, digits"]),
        ("max_camera_skew: 0.1\n", "", "max_camera_skew", ["missing"]),
        ("max_camera_skew: 0.1", "max_camera_skew: 0", "max_camera_skew", ["found 0", "above 0"]),
        ("    interface: position\n", "", "action_groups.hand.interface", ["missing"]),
        (
            "interface: position",
            "interface: velocity",
            "action_groups.hand.interface",
            ["'velocity'", "trajectory or follow_joint_trajectory or position"],
        ),
        ("[a, b, g]", "[a, b, a]", "state.joints", ["found a more than once"]),
        ("[a, b, g]", "[]", "state.joints", ["one joint name or more"]),
        ("[a, b, g]", "a", "state.joints", ["the text 'a'", "a list"]),
        (
            "[-1.0, 1.0]",
            "[1.0, -1.0]",
            "action_groups.arm.joints.b.position",
            ["[1.0, -1.0]", "lower < upper"],
        ),
        ("[-1.0, 1.0]", "[-1.0]", "action_groups.arm.joints.b.position", ["two finite numbers"]),
        ("[-1.0, 1.0]", "[-.inf, 1.0]", "action_groups.arm.joints.b.position", ["two finite numbers"]),
        ("velocity: 2.0", "velocity: 0", "action_groups.arm.joints.b.velocity", ["found 0", "above 0"]),
        ("velocity: 2.0", "velocity: yes", "action_groups.arm.joints.b.velocity", ["truth value true"]),
        (
            "velocity: 2.0",
            "velocty: 2.0",
            "action_groups.arm.joints.b.velocty",
            ["did you mean 'velocity'"],
        ),
        ("      b: {", "      g: {", "action_groups.arm.joints.g", ["action_groups.hand.joints.g has already"]),
        (
            "arm_controller/joint_trajectory",
            "hand_controller/commands",
            "action_groups.arm.topic",
            ["a controller of its own"],
        ),
        ("top/image_raw", "joint_states", "cameras.top.topic", ["a topic of its own"]),
        ("instruction: {topic: instruction}", "instruction: hello", "instruction", ["expected a mapping"]),
    ],
)
def test_a_mistake_is_named(old: str, new: str, key: str, words: list[str]) -> None:
    problems = problems_of(edited(old, new))
    about = [problem for problem in problems if problem.startswith(f"{key}:")]
    assert about, problems
    for word in words:
        assert word in about[0]


def test_every_mistake_is_told_at_once() -> None:
    text = edited("fps: 20", "fps: -1").replace("transport: raw", "transport: x").replace("[0, 0.04]", "[1, 0]")
    keys = [problem.split(":")[0] for problem in problems_of(text)]
    assert keys == ["fps", "cameras.top.transport", "action_groups.hand.joints.g.position"]


def test_a_key_written_twice_is_refused_with_both_lines() -> None:
    text = edited("      a: {", "      b: {")
    with pytest.raises(EmbodimentError, match=r"(?s)robot\.yaml.*'b' stands twice, first in line 19.*line 20"):
        Embodiment.from_yaml(text, "robot.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b", "name: [", "42"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(EmbodimentError, match=r"robot\.yaml"):
        Embodiment.from_yaml(text, "robot.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmbodimentError, match=r"nowhere\.yaml cannot be read"):
        Embodiment.load(tmp_path / "nowhere.yaml")


def test_differences_name_the_line() -> None:
    here = Embodiment.from_yaml(TWO_ARMS, "here")
    there = Embodiment.from_yaml(edited("width: 64", "width: 96").replace("velocity: 0.2", "velocity: 0.1"), "there")
    assert here.differences(there) == [
        "cameras.top.width: 64 here, 96 there",
        "action_groups.hand.joints.g.velocity: 0.2 here, 0.1 there",
    ]


def test_differences_see_what_only_one_side_has_and_the_order_of_joints() -> None:
    here = Embodiment.from_yaml(TWO_ARMS, "here")
    renamed = Embodiment.from_yaml(edited("  top: {topic: top", "  side: {topic: top"), "there")
    lines = here.differences(renamed)
    assert "cameras.top.topic: top/image_raw here, nothing there" in lines
    assert "cameras.side.topic: nothing here, top/image_raw there" in lines

    b = "      b: {position: [-1.0, 1.0], velocity: 2.0, acceleration: 8.0}\n"
    a = "      a: {position: [-2.0, 2.0], velocity: 1.0, acceleration: 4.0}\n"
    swapped = Embodiment.from_yaml(edited(b + a, a + b), "there")
    assert here.differences(swapped) == ["order of the action joints: g, b, a here, g, a, b there"]


def incompatibilities(*edits: tuple[str, str]) -> list[str]:
    text = TWO_ARMS
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    here = Embodiment.from_yaml(TWO_ARMS, "here")
    there = Embodiment.from_yaml(text, "there")
    assert here.differences(there)
    return here.incompatibilities(there)


def test_a_deployment_may_differ_in_what_the_policy_never_saw() -> None:
    assert (
        incompatibilities(
            ("topic: top/image_raw, transport: raw", "topic: top/jpeg, transport: compressed"),
            ("max_age: 0.3", "max_age: 0.5"),
            ("max_camera_skew: 0.1", "max_camera_skew: 0.3"),
            ("topic: joint_states", "topic: robot/joint_states"),
            ("instruction: {topic: instruction}", "instruction: {topic: task}"),
            ("hand_controller/commands\n    interface: position", "hand/joint_trajectory\n    interface: trajectory"),
            ("velocity: 2.0", "velocity: 1.0"),
            ("[-2.0, 2.0]", "[-1.0, 1.0]"),
        )
        == []
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("two_arms", "other", ["name: two_arms here, other there"]),
        ("fps: 20", "fps: 30", ["fps: 20 here, 30 there"]),
        ("width: 64", "width: 96", ["cameras.top.width: 64 here, 96 there"]),
        (
            "  top: {topic",
            "  side: {topic",
            [
                "cameras.top.width: 64 here, nothing there",
                "cameras.top.height: 48 here, nothing there",
                "cameras.side.width: nothing here, 64 there",
                "cameras.side.height: nothing here, 48 there",
            ],
        ),
        ("[a, b, g]", "[b, a, g]", ["state.joints: a, b, g here, b, a, g there"]),
        ("      a: {", "      c: {", ["action joints: g, b, a here, g, b, c there"]),
    ],
)
def test_what_the_policy_was_trained_on_must_be_the_same(old: str, new: str, expected: list[str]) -> None:
    assert incompatibilities((old, new)) == expected


def test_every_topic_to_record_with_its_type() -> None:
    assert Embodiment.from_yaml(TWO_ARMS, "robot.yaml").topics == {
        "top/image_raw": "sensor_msgs/msg/Image",
        "joint_states": "sensor_msgs/msg/JointState",
        "instruction": "std_msgs/msg/String",
        "hand_controller/commands": "std_msgs/msg/Float64MultiArray",
        "arm_controller/joint_trajectory": "trajectory_msgs/msg/JointTrajectory",
    }
    text = edited(
        "arm_controller/joint_trajectory\n    interface: trajectory", "arm/go\n    interface: follow_joint_trajectory"
    )
    text = text.replace("transport: raw", "transport: compressed")
    topics = Embodiment.from_yaml(text, "robot.yaml").topics
    assert topics["top/image_raw"] == "sensor_msgs/msg/CompressedImage"
    assert topics["arm/go/_action/feedback"] == "control_msgs/action/FollowJointTrajectory_FeedbackMessage"
