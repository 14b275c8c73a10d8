"""What the launch files compute: names below a namespace, cameras over a network, the recorder's command."""

from dataclasses import replace
from pathlib import Path

import pytest

from dit_policy_ros.deployment import over_network, record_command, resolve
from dit_policy_ros.embodiment import Embodiment

ROOT = Path(__file__).parents[1]


@pytest.fixture
def arm() -> Embodiment:
    return Embodiment.load(ROOT / "config/embodiments/sim_arm.yaml")


@pytest.mark.parametrize(
    ("topic", "namespace", "expected"),
    [
        ("joint_states", "", "/joint_states"),
        ("joint_states", "/", "/joint_states"),
        ("camera/image", "left", "/left/camera/image"),
        ("camera/image", "/lab/left/", "/lab/left/camera/image"),
        ("/joint_states", "left", "/joint_states"),
    ],
)
def test_names_are_those_that_a_node_would_make(topic: str, namespace: str, expected: str) -> None:
    assert resolve(topic, namespace) == expected


def test_over_a_network_raw_cameras_come_compressed_and_the_policy_still_fits(arm: Embodiment) -> None:
    seen = over_network(arm)
    assert {camera.name: (camera.topic, camera.transport) for camera in seen.cameras} == {
        "workspace": ("workspace_camera/image_raw/compressed", "compressed"),
        "wrist": ("wrist_camera/image_raw/compressed", "compressed"),
    }
    assert seen.incompatibilities(arm) == []
    assert replace(seen, cameras=arm.cameras) == arm
    assert over_network(seen) == seen


def test_an_embodiment_over_a_network_is_a_valid_file(arm: Embodiment) -> None:
    seen = over_network(arm)
    assert Embodiment.from_yaml(seen.to_yaml(), "test") == seen


def test_record_names_the_topics_of_the_embodiment_and_no_others(arm: Embodiment) -> None:
    command = record_command(arm, "left", "bags/one")
    topics = command[command.index("--topics") + 1 :]
    assert sorted(topics) == [
        "/left/arm_controller/joint_trajectory",
        "/left/instruction",
        "/left/joint_states",
        "/left/workspace_camera/image_raw",
        "/left/wrist_camera/image_raw/compressed",
    ]
    assert command[: command.index("--topics")] == [
        "ros2", "bag", "record", "--storage", "mcap", "--output", "bags/one"
    ]  # fmt: skip


def test_record_on_simulated_time_without_a_name(arm: Embodiment) -> None:
    command = record_command(arm, "", "", use_sim_time=True)
    assert "--use-sim-time" in command
    assert "--output" not in command


def test_record_hears_an_actions_feedback_which_is_hidden(arm: Embodiment) -> None:
    group = replace(arm.action_groups[0], interface="follow_joint_trajectory", topic="arm/follow_joint_trajectory")
    command = record_command(replace(arm, action_groups=(group,)), "", "x")
    assert "--include-hidden-topics" in command
    assert "/arm/follow_joint_trajectory/_action/feedback" in command
    assert "--include-hidden-topics" not in record_command(arm, "", "x")
