"""What the simulated robot says on its topics: names, rates, and fields of messages, for the node and the recorder.

Topics' names are relative. The `*_fields` functions give the fields of a message but its header, as keyword arguments
for a class of rclpy or rosbags; data are numpy arrays.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from dit_policy_ros.sim.scene import JOINTS

WORKSPACE_IMAGE = "workspace_camera/image_raw"
WRIST_IMAGE = "wrist_camera/image_raw/compressed"
JOINT_STATES = "joint_states"
ARM_CONTROLLER, GRIPPER_CONTROLLER = "arm_controller", "gripper_controller"
ARM_TRAJECTORY = f"{ARM_CONTROLLER}/joint_trajectory"
ARM_CONTROLLER_STATE = f"{ARM_CONTROLLER}/controller_state"
GRIPPER_TRAJECTORY = f"{GRIPPER_CONTROLLER}/joint_trajectory"
INSTRUCTION = "instruction"
SCENE_STATE = "scene_state"
RESET_SCENE = "reset_scene"  # a service

CAMERA_RATE, JOINT_RATE, COMMAND_RATE = 15, 100, 10  # Hz
IMAGES = {"workspace": WORKSPACE_IMAGE, "wrist": WRIST_IMAGE}
FRAMES = {"workspace": "workspace_camera_optical_frame", "wrist": "wrist_camera_optical_frame"}
BASE_FRAME = "panda_link0"


def shuffled_joints(rng: np.random.Generator, names: Sequence[str] = JOINTS) -> list[str]:
    """The joints' names in an order that is not the given one: whoever reads joint states must go by name."""
    if len(names) < 2:
        raise ValueError(f"one joint has one order: {list(names)}")
    while True:
        order = [names[i] for i in rng.permutation(len(names))]
        if order != list(names):
            return order


def image_fields(rgb: np.ndarray) -> dict[str, Any]:
    """Of a sensor_msgs/Image, encoding rgb8, from a picture (H, W, 3) uint8."""
    height, width, channels = rgb.shape
    return {
        "height": height,
        "width": width,
        "encoding": "rgb8",
        "is_bigendian": 0,
        "step": width * channels,
        "data": np.ascontiguousarray(rgb).reshape(-1),
    }


def encode_jpeg(rgb: np.ndarray, quality: int = 90) -> np.ndarray:
    """A picture (H, W, 3) uint8 RGB as the bytes of a JPEG file, a flat uint8 array."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"OpenCV cannot encode an image of shape {rgb.shape} and type {rgb.dtype} as JPEG")
    return data.reshape(-1)


def compressed_image_fields(rgb: np.ndarray) -> dict[str, Any]:
    """Of a sensor_msgs/CompressedImage from a picture (H, W, 3) uint8; the format as image_transport writes it."""
    return {"format": "rgb8; jpeg compressed bgr8", "data": encode_jpeg(rgb)}


def joint_state_fields(
    order: Sequence[str], names: Sequence[str], position: np.ndarray, velocity: np.ndarray
) -> dict[str, Any]:
    """Of a sensor_msgs/JointState in the given order; `position` and `velocity` are in the order of `names`."""
    index = [names.index(name) for name in order]
    return {
        "name": list(order),
        "position": np.asarray(position, dtype=np.float64)[index],
        "velocity": np.asarray(velocity, dtype=np.float64)[index],
        "effort": np.array([], dtype=np.float64),
    }
