"""A robot of two small cameras and two joints, and its messages as namespaces with the fields of the ROS types."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from dit_policy_ros.embodiment import ActionGroup, Camera, Embodiment, JointLimits, State
from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.observations import ObservationBuffer

MS = 1_000_000
ROBOT = Embodiment(
    name="test",
    fps=10,
    instruction_topic="instruction",
    cameras=(
        Camera("top", "top/image_raw", "raw", 6, 4, 0.3),
        Camera("wrist", "wrist/compressed", "compressed", 16, 8, 0.3),
    ),
    max_camera_skew=0.3,
    state=State("joint_states", ("a", "b"), 0.2),
    action_groups=(
        ActionGroup("arm", "arm/joint_trajectory", "trajectory", {"a": JointLimits(-99.0, 99.0, 2.0, 10.0)}),
    ),
)
T0 = 1_700_000_000_000_000_000  # of the size of real stamps: floats would lose 100 ns here


def header(t_ns: int) -> SimpleNamespace:
    return SimpleNamespace(stamp=SimpleNamespace(sec=t_ns // 10**9, nanosec=t_ns % 10**9))


def top(t_ns: int, value: int) -> SimpleNamespace:
    data = np.full((4, 6, 3), value % 256, np.uint8).tobytes()
    return SimpleNamespace(header=header(t_ns), height=4, width=6, encoding="rgb8", step=18, data=data)


def wrist(t_ns: int, value: int) -> SimpleNamespace:
    done, data = cv2.imencode(".png", np.full((8, 16, 3), value % 256, np.uint8))
    assert done
    return SimpleNamespace(header=header(t_ns), format="png", data=data.tobytes())


def joints(t_ns: int, value: float, velocity: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        header=header(t_ns),
        name=["b", "finger", "a"],
        position=[-value, 7.0, value],
        velocity=[] if velocity is None else [-velocity, 0.0, velocity],
    )


def add(buffer: ObservationBuffer, *messages: tuple[str, Any]) -> None:
    for topic, message in messages:
        buffer.add(topic, stamp_ns(message), message)
