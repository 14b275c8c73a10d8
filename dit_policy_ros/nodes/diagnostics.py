"""How the node fares, as a `/diagnostics` message: one line a state, with everything counted and measured.

Everything refused is counted by its verdict, so a chunk that was not sent can be seen without reading a log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from dit_policy_ros.nodes.account import Account
from dit_policy_ros.nodes.beat import Beat
from dit_policy_ros.policy.engine import PathReport
from dit_policy_ros.runtime.gate import Verdict
from dit_policy_ros.runtime.streams import StreamStatistics


def diagnostic_array(stamp: object, name: str, state: str, account: Account, values: dict[str, str]) -> DiagnosticArray:
    """One DiagnosticStatus: ERROR with a fault, WARN with trouble or when the last chunk was refused, otherwise OK.

    `stamp` is a builtin_interfaces/Time, `state` the lifecycle state's label, `values` further key-value pairs.
    """
    level, message = DiagnosticStatus.OK, state
    if account.fault is not None:
        level, message = DiagnosticStatus.ERROR, account.wrong
    elif account.running and account.troubles:
        level, message = DiagnosticStatus.WARN, account.wrong
    elif account.running and not account.last.accepted:
        level, message = DiagnosticStatus.WARN, account.last.reason
    status = DiagnosticStatus(level=level, name=name, message=message, hardware_id=values.get("embodiment", ""))
    pairs = {"state": state} | values | account_values(account)
    status.values = [KeyValue(key=key, value=value) for key, value in pairs.items()]
    array = DiagnosticArray(status=[status])
    array.header.stamp = stamp
    return array


def account_values(account: Account) -> dict[str, str]:
    """What the motion has done, latencies in s."""
    values = {
        "moving": str(account.moving),
        "fault": account.fault.fault.name.lower() if account.fault is not None else "none",
        "faults": str(account.faults),
        "inference_p50": f"{account.latency_p50:.4f}",
        "inference_p95": f"{account.latency_p95:.4f}",
        "inference_p99": f"{account.latency_p99:.4f}",
        "own_cpu_p50": f"{account.own_cpu_p50:.5f}",
        "budget_steps": f"{account.budget_steps:.2f}",
        "deadlines_missed": str(account.deadlines_missed),
        "consecutive_rejections": str(account.consecutive_rejections),
        "clamped": str(account.clamped),
        "encoded_ahead": str(account.encoded_ahead),
        "encoding_failed": str(account.encoding_failed),
    }
    return values | {f"verdict.{verdict.name.lower()}": str(account.verdicts[verdict]) for verdict in Verdict}


def input_values(statistics: Mapping[str, StreamStatistics]) -> dict[str, str]:
    """Each stream's rate (Hz), age (s) and counts, as `input.<name>.<what>`."""
    values = {}
    for name, stream in statistics.items():
        values[f"input.{name}.rate"] = f"{stream.rate:.1f}"
        values[f"input.{name}.age"] = f"{stream.age:.3f}"
        for what in ("received", "late", "duplicates", "before_reset", "resets"):
            values[f"input.{name}.{what}"] = str(getattr(stream, what))
    return values


def beat_values(beat: Beat) -> dict[str, str]:
    """How late the beat's calls are (s), with inference running and without."""
    values = {"beat.missed": str(beat.missed), "beat.errors": str(beat.errors)}
    for when, busy in (("idle", False), ("inference", True)):
        for percentile in (50, 99):
            values[f"beat.lateness_p{percentile}.{when}"] = f"{beat.lateness(percentile, busy):.6f}"
    return values


def path_values(reports: Iterable[PathReport]) -> dict[str, str]:
    """What came of each fast path of the engine, as key-value pairs `fast_path.<name>`."""
    return {f"fast_path.{report.name}": str(report) for report in reports}


def memory_values(device: str) -> dict[str, str]:
    """GPU memory that the policy holds, and the most it ever held, in MB; empty on a CPU."""
    if not device.startswith("cuda"):
        return {}
    used, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return {"gpu_memory_mb": f"{used / 1e6:.1f}", "gpu_memory_max_mb": f"{most / 1e6:.1f}"}
