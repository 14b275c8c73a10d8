"""When the robot stood still. Frames of standing teach a policy to stand: their share is worth knowing.

An instant is idle if in the 0.2 s before it no joint of the state went farther than `idle_speed` would take it: the
mean speed over that time, not one from noise between two readings. At an episode's first instants that is the way since
its first frame; the first frame is what the second is.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

WINDOW = 0.2  # s

_WINDOW_NS = round(WINDOW * 1e9)


class Stillness:
    """Tells idle instants from others, given the positions one after the other."""

    def __init__(self, idle_speed: float):
        """idle_speed: rad/s or m/s."""
        self._way = idle_speed * WINDOW
        self._recent: deque[tuple[int, np.ndarray]] = deque()

    def is_idle(self, t_ns: int, positions: np.ndarray) -> bool:
        """Whether the instant is idle; t_ns rises from call to call."""
        recent = self._recent
        recent.append((t_ns, positions))
        while len(recent) > 1 and recent[1][0] <= t_ns - _WINDOW_NS:
            recent.popleft()
        return bool(np.abs(positions.astype(np.float64) - recent[0][1]).max() <= self._way)


class Movement:
    """How an episode moved: its idle frames, where they are, and each joint's peak speed, from its frames."""

    def __init__(self, fps: int, idle_speed: float):
        self._fps = fps
        self._stillness = Stillness(idle_speed)
        self._before: np.ndarray | None = None
        self._frames = self._counted = self._idle = self._idle_start = self._idle_end = 0
        self._peaks: np.ndarray | None = None

    def add(self, t_ns: int, positions: np.ndarray) -> None:
        """Take the next frame's measured positions (J,)."""
        idle = self._stillness.is_idle(t_ns, positions)
        if self._before is not None:
            steps = np.abs(positions.astype(np.float64) - self._before)
            self._peaks = steps if self._peaks is None else np.maximum(self._peaks, steps)
            # The first frame, of which nothing was known yet, is what the second one is.
            for _ in range(2 if self._frames == 1 else 1):
                self._count(idle)
        self._before = positions
        self._frames += 1

    def _count(self, idle: bool) -> None:
        self._counted += 1
        self._idle += idle
        self._idle_end = self._idle_end + 1 if idle else 0
        if self._idle_end == self._counted:
            self._idle_start = self._counted

    @property
    def idle_share(self) -> float:
        """Of the frames, 0 to 1."""
        return self._idle / self._frames if self._frames else 0.0

    @property
    def idle_start(self) -> float:
        """How long it stood still at the beginning, s."""
        return self._idle_start / self._fps

    @property
    def idle_end(self) -> float:
        """How long it stood still at the end, s."""
        return self._idle_end / self._fps

    def peak_speeds(self, joints: Sequence[str]) -> dict[str, float]:
        """The largest mean speed from one frame to the next, rad/s or m/s, by joint."""
        peaks = np.zeros(len(joints)) if self._peaks is None else self._peaks
        return {joint: float(peak * self._fps) for joint, peak in zip(joints, peaks, strict=True)}
