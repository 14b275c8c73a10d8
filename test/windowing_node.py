"""The real policy node, which also keeps the observation windows at the instants that a file lists.

Only for test/test_parity.py. TICKS_FILE is an .npy of stamps in ns, rising; once they are through, WINDOWS_FILE is
written: an .npz of `<tick>/observation.images.<camera>`, (n_obs_steps, 3, H, W), and `<tick>/observation.state`. Each
observation message is acknowledged on ~/received by how many there have been.
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
from std_msgs.msg import UInt64

from dit_policy_ros.nodes import lifecycle
from dit_policy_ros.nodes.motion import Motion
from dit_policy_ros.nodes.policy_node import main
from dit_policy_ros.nodes.session import Session

LATE_NS = 100_000_000  # how much later than its stamp a message may come and still count


class WindowingNode(lifecycle.PolicyNode):
    """See above."""

    def __init__(self) -> None:
        super().__init__()
        self._ticks = np.load(os.environ["TICKS_FILE"]).tolist()
        self._windows: dict[str, np.ndarray] = {}
        self._received = 0
        self._acknowledge = self.create_publisher(UInt64, "~/received", 10)

    def _on_image(self, session: Session, motion: Motion, topic: str, message: object) -> None:
        super()._on_image(session, motion, topic, message)
        self._keep(session)

    def _on_joints(self, session: Session, topic: str, message: object) -> None:
        super()._on_joints(session, topic, message)
        self._keep(session)

    def _keep(self, session: Session) -> None:
        reached_ns = session.observations.newest_common_ns()
        while self._ticks and reached_ns is not None and self._ticks[0] + LATE_NS <= reached_ns:
            tick_ns = self._ticks.pop(0)
            window = session.observations.window(tick_ns)
            for camera, images in window.images.items():
                self._windows[f"{tick_ns}/observation.images.{camera}"] = np.stack(images)
            self._windows[f"{tick_ns}/observation.state"] = window.state
            if not self._ticks:
                self._write()
        self._received += 1
        self._acknowledge.publish(UInt64(data=self._received))

    def _write(self) -> None:
        path = Path(os.environ["WINDOWS_FILE"])
        partial = path.with_name("partial.npz")
        np.savez(partial, **self._windows)
        partial.rename(path)


if __name__ == "__main__":
    with patch.object(lifecycle, "PolicyNode", WindowingNode):
        main()
