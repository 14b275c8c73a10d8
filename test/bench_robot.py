"""The robot of `make bench-node`, a process of its own: two 640x480 cameras at 30 Hz, joint states at 100 Hz, at rest.

python test/bench_robot.py raw|compressed
"""

from __future__ import annotations

import sys
from contextlib import suppress

import cv2
import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image, JointState
from trajectory_msgs.msg import JointTrajectory

from dit_policy_ros.sim.scene import ARM_JOINTS

WIDTH, HEIGHT, CAMERA_HZ, JOINT_HZ = 640, 480, 30, 100
CAMERAS = {"workspace": "workspace_camera/image", "wrist": "wrist_camera/image"}
HOME = (0.0, -0.4, 0.0, -2.0, 0.0, 2.0, 0.8)


def picture() -> np.ndarray:
    """Something that a JPEG finds as hard as a camera's picture: shapes, slopes and a sensor's noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([x / WIDTH, y / HEIGHT, (x + y) / (WIDTH + HEIGHT)], axis=-1) * 160 + 40
    for _ in range(60):
        left, top = rng.integers(0, WIDTH - 80), rng.integers(0, HEIGHT - 80)
        image[top : top + rng.integers(10, 80), left : left + rng.integers(10, 80)] = rng.integers(0, 255, 3)
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


class BenchRobot(Node):
    """Publishes what it made once, with a new stamp each time."""

    def __init__(self, transport: str) -> None:
        super().__init__("bench_robot")
        image = picture()
        if transport == "raw":
            self._message = Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=3 * WIDTH)
            self._message.data = image.tobytes()
        else:
            self._message = CompressedImage(format="rgb8; jpeg compressed bgr8")
            self._message.data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        kind = type(self._message)
        self._cameras = [self.create_publisher(kind, topic, qos_profile_sensor_data) for topic in CAMERAS.values()]
        self._joints = self.create_publisher(JointState, "joint_states", qos_profile_sensor_data)
        # A controller that listens: without one the node would bring the arm to rest.
        self.create_subscription(JointTrajectory, "arm_controller/joint_trajectory", lambda _: None, 10)
        self.create_timer(1 / CAMERA_HZ, self._see)
        self.create_timer(1 / JOINT_HZ, self._feel)

    def _see(self) -> None:
        self._message.header.stamp = self.get_clock().now().to_msg()
        for camera in self._cameras:
            camera.publish(self._message)

    def _feel(self) -> None:
        message = JointState(name=list(ARM_JOINTS), position=HOME, velocity=[0.0] * len(HOME))
        message.header.stamp = self.get_clock().now().to_msg()
        self._joints.publish(message)


if __name__ == "__main__":
    rclpy.init()
    with suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.spin(BenchRobot(sys.argv[1]))
