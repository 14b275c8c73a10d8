"""What the node has done and how it fares, as a `/diagnostics` message and as a `PolicyStatus`.

Everything refused is counted by its verdict, so a chunk that was not sent can be seen without reading a log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from dit_policy_ros.policy.engine import PathReport
from dit_policy_ros.runtime.gate import Decision, Verdict

STALE_VERDICTS = frozenset({Verdict.INPUT_MISSING, Verdict.INPUT_STALE})


@dataclass
class Tally:
    """Decisions since activation: how many of each verdict, and the last one."""

    by_verdict: Counter[Verdict] = field(default_factory=Counter)
    last: Decision = field(default_factory=lambda: Decision(Verdict.ACCEPTED, ""))

    def add(self, decision: Decision) -> None:
        """Count one decision."""
        self.by_verdict[decision.verdict] += 1
        self.last = decision

    @property
    def sent(self) -> int:
        """Chunks that went to the controllers."""
        return self.by_verdict[Verdict.ACCEPTED]

    @property
    def stale(self) -> int:
        """Times no chunk was sampled because an input was missing or too old."""
        return sum(self.by_verdict[verdict] for verdict in STALE_VERDICTS)

    @property
    def rejected(self) -> int:
        """Chunks refused for any other reason."""
        return sum(self.by_verdict.values()) - self.sent - self.stale


def path_values(reports: Iterable[PathReport]) -> dict[str, str]:
    """What came of each fast path of the engine, as key-value pairs `fast_path.<name>`."""
    return {f"fast_path.{report.name}": str(report) for report in reports}


def diagnostic_array(stamp: object, name: str, state: str, tally: Tally, values: dict[str, str]) -> DiagnosticArray:
    """One DiagnosticStatus: OK when the last decision was to send, WARN when it was to refuse, with all counts.

    `stamp` is a builtin_interfaces/Time, `state` the lifecycle state's label, `values` further key-value pairs.
    """
    refusing = state == "active" and tally.last.verdict is not Verdict.ACCEPTED
    status = DiagnosticStatus(
        level=DiagnosticStatus.WARN if refusing else DiagnosticStatus.OK,
        name=name,
        message=tally.last.reason if refusing else state,
        hardware_id=values.get("embodiment", ""),
    )
    counts = {f"verdict.{verdict.name.lower()}": str(tally.by_verdict[verdict]) for verdict in Verdict}
    pairs = {"state": state} | values | counts
    status.values = [KeyValue(key=key, value=value) for key, value in pairs.items()]
    array = DiagnosticArray(status=[status])
    array.header.stamp = stamp
    return array
