"""What can go wrong while the arm moves, as a code and a sentence: the vocabulary of all watchdogs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Fault(IntEnum):
    """Why the arm was brought to rest. The values are those of dit_policy_msgs/PolicyStatus's constants."""

    NONE = 0
    INPUT = 1  # a camera or the joint states: stopped, frozen, unusable, or jumped
    INFERENCE = 2  # a chunk takes longer than inference_timeout
    REJECTIONS = 3  # max_consecutive_rejections chunks in a row were refused
    CONTROLLER = 4  # a controller does not listen, does not report, or is too far from its reference
    CLOCK = 5  # the clock jumped
    FOREIGN_COMMAND = 6  # somebody else commands the arm
    GUARD = 7  # the guard stopped the arm while this node was out of reach
    STALLED = 8  # this node itself stood still


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong now: which watchdog says so, and a sentence with what, where and what to do."""

    fault: Fault
    reason: str
