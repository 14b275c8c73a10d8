"""One prediction of the policy, a chunk, and which of its steps are still to come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SHORTEST_LEAD = 0.02  # s: several times what a controller's take-up of a message varies by


@dataclass(frozen=True)
class Chunk:
    """Row j of `positions` is where the joints should be at begin_ns + (j + 1) * step_duration.

    positions: (steps, dims) float64, absolute, rad, in the order of joint_names; durations in s. The first
    n_action_steps rows are executed before the next chunk takes over, the rest is the spare tail that the
    arm follows if the next one is late.
    """

    observation_stamp_ns: int
    sequence: int
    joint_names: tuple[str, ...]
    positions: np.ndarray
    step_duration: float
    n_action_steps: int
    instruction: str
    inference_duration: float
    rested_ns: int = 0

    @property
    def begin_ns(self) -> int:
        """When the chunk begins: with its observation, or as much later as the arm has rested since.

        A resting arm is where it was observed, and need not hurry through the steps that inference took.
        """
        return self.observation_stamp_ns + self.rested_ns

    @property
    def due_times_ns(self) -> np.ndarray:
        """(steps,) int64: when each row is due, on the clock that stamped the observation."""
        steps = np.arange(1, len(self.positions) + 1)
        return self.begin_ns + np.rint(steps * self.step_duration * 1e9).astype(np.int64)


def drop_elapsed(chunk: Chunk, now_ns: int, minimum_lead: float | None = None) -> tuple[np.ndarray, np.ndarray, int]:
    """Drop the rows that are due by now and re-time the rest from now, by the clock and by nothing else.

    Returns positions (n, dims), their times from now (n,) in s, all above `minimum_lead`, and the number
    dropped. The tail behind n_action_steps is kept. n is 0 when all have elapsed.

    `minimum_lead` (s; half a step, or 20 ms if that is more, unless given) drops a row that is due too soon as well:
    the controller starts from where the arm *is*, and to make up a lag or a late start in a few milliseconds is a jerk.
    """
    lead = max(chunk.step_duration / 2, _SHORTEST_LEAD) if minimum_lead is None else minimum_lead
    times = (chunk.due_times_ns - now_ns) / 1e9
    dropped = int(np.searchsorted(times, lead, side="right"))
    return chunk.positions[dropped:], times[dropped:], dropped
