"""How the motion stands and what it has done, taken at one moment for the status and the diagnostics."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from dit_policy_ros.runtime.faults import Fault, Trouble
from dit_policy_ros.runtime.gate import Decision, Verdict

STALE_VERDICTS = frozenset({Verdict.INPUT_MISSING, Verdict.INPUT_STALE})


@dataclass(frozen=True)
class Account:
    """How the motion stands and what it has done since its start, all at one moment. Latencies in s, NaN before any."""

    running: bool
    moving: bool
    fault: Trouble | None
    troubles: tuple[Trouble, ...]  # what is wrong now, become the fault or not
    verdicts: Counter[Verdict]
    last: Decision
    consecutive_rejections: int
    deadlines_missed: int
    clamped: int
    faults: int
    encoded_ahead: int  # times that frames were encoded before a chunk asked for them, and how often that failed
    encoding_failed: int
    budget_steps: float
    latency_p50: float
    latency_p95: float
    latency_p99: float
    own_cpu_p50: float  # s of CPU that a chunk costs beside encoder and denoising

    @property
    def wrong(self) -> str:
        """The fault's sentence and those of all other kinds of trouble there are now; empty if all is well."""
        first = [self.fault] if self.fault is not None else []
        by_kind: dict[Fault, str] = {}
        for trouble in (*first, *self.troubles):
            by_kind.setdefault(trouble.fault, trouble.reason)
        return "; also: ".join(by_kind.values())

    @property
    def accepted(self) -> int:
        """Chunks sent to the controllers, or that would have been but for a dry run."""
        return self.verdicts[Verdict.ACCEPTED]

    @property
    def stale(self) -> int:
        """Times no chunk was sampled because an input was missing or too old."""
        return sum(self.verdicts[verdict] for verdict in STALE_VERDICTS)

    @property
    def refused(self) -> int:
        """Chunks refused for any other reason."""
        return sum(self.verdicts.values()) - self.accepted - self.stale


NOTHING_DONE = Account(
    running=False,
    moving=False,
    fault=None,
    troubles=(),
    verdicts=Counter(),
    last=Decision(Verdict.ACCEPTED),
    consecutive_rejections=0,
    deadlines_missed=0,
    clamped=0,
    faults=0,
    encoded_ahead=0,
    encoding_failed=0,
    budget_steps=0.0,
    latency_p50=math.nan,
    latency_p95=math.nan,
    latency_p99=math.nan,
    own_cpu_p50=math.nan,
)
