"""What the conductor is told and what it answers: settings, directives, outcomes, counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from dit_policy_ros.policy.sampling import AS_CONFIGURED, Sampling
from dit_policy_ros.runtime.chunking import Chunk
from dit_policy_ros.runtime.faults import Fault
from dit_policy_ros.runtime.gate import Decision, Verdict
from dit_policy_ros.runtime.joining import Joining, Seam
from dit_policy_ros.runtime.pipeline import Request
from dit_policy_ros.runtime.trajectory import Trajectory

OnFault = Literal["stop", "finish_chunk"]
Recovery = Literal["manual", "automatic"]


@dataclass(frozen=True)
class Settings:
    """The live parameters, as they are at one tick; a chunk keeps those of its request, but for dry_run and clamp.

    speed_scale, above 0, at most 1: chunks are executed so much slower than they were learnt. inference_timeout and
    budget_margin in s.
    """

    n_action_steps: int
    sampling: Sampling = AS_CONFIGURED
    joining: Joining = "replace"
    speed_scale: float = 1.0
    clamp: bool = False
    dry_run: bool = False
    max_consecutive_rejections: int = 5
    on_fault: OnFault = "stop"
    recovery: Recovery = "manual"
    inference_timeout: float = 1.0
    budget_margin: float = 0.02


@dataclass(frozen=True)
class Outcome:
    """What became of a request. `trajectory`, of all action joints, is there if and only if the verdict is ACCEPTED.

    sent: whether it is to go to the controllers (in a dry run it is not). seam: the jump against the course it
    replaces, None if there was none in motion. clamped: how many values were clipped into the limits.
    """

    request: Request
    decision: Decision
    chunk: Chunk | None = None
    steps_dropped: int = 0
    steps_committed: int = 0
    trajectory: Trajectory | None = None
    sent: bool = False
    seam: Seam | None = None
    clamped: int = 0


@dataclass(frozen=True)
class Directive:
    """What a tick asks of the node: a chunk to be sampled, a stop to be sent, a refusal to be published."""

    request: Request | None = None
    stop: Trajectory | None = None
    refusal: Outcome | None = None


@dataclass
class Counts:
    """What has happened since the start."""

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    last: Decision = field(default_factory=lambda: Decision(Verdict.ACCEPTED))
    consecutive_rejections: int = 0
    deadlines_missed: int = 0
    clamped: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)
