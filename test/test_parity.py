"""A bag replayed over DDS to the policy node gives it the windows, bit for bit, that the converter made of the bag."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy_robot
from dit_policy_training.conversion.bag_to_shard import sampled
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.sampling import Row
from listener import Listener
from policy_fixtures import INSTRUCTIONS, demo_config, make_stats
from rosbags.highlevel import AnyReader
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import UInt64
from windowing_node import LATE_NS

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.nodes.processes import Child
from dit_policy_ros.policy.checkpoint import save_checkpoint
from dit_policy_ros.policy.configuration import Feature
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip

pytestmark = pytest.mark.ros

N_OBS_STEPS = 2
RECEIVED = "/dit_policy/received"
AGAIN_S = 3.0  # a picture is sent as best effort: one that is lost comes again, and twice does not count
OBSERVED = {"side/image_raw": Image, "hand/image_raw/compressed": CompressedImage, "joint_states": JointState}


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_robot.write_bag(tmp_path_factory.mktemp("bags") / "bag", toy_robot.messages(3.0))


@pytest.fixture(scope="module")
def rows(bag: Path) -> list[Row]:
    embodiment = Embodiment.from_yaml(toy_robot.EMBODIMENT, "toy")
    config = ConvertConfig(str(bag), Path("toy.yaml"), Path("out"))
    return [event for event in sampled(bag, config, embodiment) if isinstance(event, Row)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tiny_clip(folder / "clip")
    pictures = {"side": (3, 32, 48), "hand": (3, 32, 32)}
    config = demo_config(
        str(folder / "clip"),
        n_obs_steps=N_OBS_STEPS,
        tasks=INSTRUCTIONS,
        action_state_indices=[1, 0],
        input_features={
            **{f"observation.images.{name}": Feature("VISUAL", shape) for name, shape in pictures.items()},
            "observation.state": Feature("STATE", (3,)),
        },
        output_features={"action": Feature("ACTION", (2,))},
    )
    policy = MultitaskDiTPolicy(config, make_stats(config))
    save_checkpoint(folder / "policy", policy, toy_robot.EMBODIMENT, "a test's")
    return folder / "policy"


@pytest.fixture
def node(checkpoint: Path, rows: list[Row], tmp_path: Path) -> Iterator[Child]:
    # The first rows have no window, and the last instants are not reached by every stream.
    np.save(tmp_path / "ticks.npy", ticks_of(rows))
    script = Path(__file__).with_name("windowing_node.py")
    # The bag's stamps are those of its recording: the node lives in that time, which never comes.
    parameters = ["-p", f"checkpoint:={checkpoint}", "-p", "warmup_chunks:=1", "-p", "use_sim_time:=true"]
    files = {"TICKS_FILE": str(tmp_path / "ticks.npy"), "WINDOWS_FILE": str(tmp_path / "windows.npz")}
    command = [sys.executable, str(script), "--ros-args", *parameters]
    child = Child("windowing node", command, tmp_path / "node.log", {"OMP_NUM_THREADS": "1", **files})
    yield child
    child.send(signal.SIGINT)
    child.stop()


def ticks_of(rows: list[Row]) -> np.ndarray:
    return np.array([row.stamp_ns for row in rows[N_OBS_STEPS - 1 : -(LATE_NS // 100_000_000 + 1)]])


def replay(bag: Path, listener: Listener) -> int:
    """Send each observation once the one before has been acknowledged; how many there were."""
    count = 0
    with AnyReader([bag]) as reader:
        connections = [c for c in reader.connections if c.topic.lstrip("/") in OBSERVED]
        for connection, _, raw in reader.messages(connections):
            topic = connection.topic
            publisher = listener.publisher(topic, OBSERVED[topic.lstrip("/")])
            seen = len(listener.heard[RECEIVED])
            deadline = time.monotonic() + 60.0
            while len(listener.heard[RECEIVED]) == seen:
                assert time.monotonic() < deadline, f"message {count} on {topic} is not acknowledged"
                publisher.publish(bytes(raw))
                listener.wait_until(lambda seen=seen: len(listener.heard[RECEIVED]) > seen, AGAIN_S)
            count += 1
    return count


@pytest.mark.timeout(300)  # a node starts, and each message is acknowledged
def test_the_nodes_windows_are_the_converters(bag: Path, rows: list[Row], node: Child, tmp_path: Path) -> None:
    listener = Listener(node, {RECEIVED: UInt64})
    try:
        assert listener.transition("configure"), node.last_lines()
        assert replay(bag, listener) > 200
        listener.wait((tmp_path / "windows.npz").exists, "the windows")
    finally:
        listener.close()
    windows = np.load(tmp_path / "windows.npz")
    ticks = ticks_of(rows)
    assert len(ticks) > 20
    assert {name.partition("/")[0] for name in windows.files} == {str(tick) for tick in ticks}
    for k, tick in enumerate(ticks):
        for step, row in enumerate(rows[k : k + N_OBS_STEPS]):
            for key, expected in row.frame.items():
                seen = windows[f"{tick}/{key}"][step]
                assert np.array_equal(seen if seen.ndim == 1 else seen.transpose(1, 2, 0), expected), (k, step, key)
