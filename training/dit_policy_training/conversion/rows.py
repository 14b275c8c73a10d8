"""What comes out of a bag: rows, and where an episode of them ends."""

from dataclasses import dataclass

import numpy as np


class SampleError(ValueError):
    """A recording that makes no sound rows; the message says what was found, where, and what to do."""


@dataclass(frozen=True)
class Row:
    """One tick.

    frame: {"observation.images.<camera>": (H, W, 3) uint8 RGB, or (H, W) float32 m of a depth camera,
    "observation.state": (S,) float32}, arrays that may be shared and must not be written to; action (A,) float32;
    ages: s from the message used to the tick, by stream.
    """

    stamp_ns: int
    task: str
    frame: dict[str, np.ndarray]
    action: np.ndarray
    ages: dict[str, float]


@dataclass(frozen=True)
class EpisodeEnd:
    """The rows since the last one are an episode; `reason`: why it is left out, None to keep it."""

    reason: str | None
