"""What the benchmarks share: interleaved timing, rows with bars, and the report as a file and as a table."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_policy_ros.nodes.demo_report import machine, versions

Row = dict[str, Any]
FOLDER = Path("outputs/bench")


def interleave(
    subjects: Mapping[str, Callable[[], object]],
    repeats: int,
    wait: Callable[[], None] = lambda: None,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each subject's runs, one of each in turn, so that what disturbs the machine disturbs all alike.

    `wait` returns when the device has done what it was given.
    """
    for subject in subjects.values():
        for _ in range(warm_up):
            subject()
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(repeats):
        for name, subject in subjects.items():
            wait()
            started = time.perf_counter()
            subject()
            wait()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratios of runs that followed each other."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
    return middle, low, high


def ratio_row(name: str, slow: Sequence[float], fast: Sequence[float], bar: float | None, how: str) -> Row:
    """How many times faster, with the bar if there is one; `how` gets the times and the spread."""
    value, low, high = ratios(slow, fast)
    times = f"{statistics.median(slow) * 1e3:.1f} ms against {statistics.median(fast) * 1e3:.1f} ms"
    return {
        "name": name,
        "value": round(value, 2),
        "unit": "times faster",
        "bar": None if bar is None else f">= {bar}",
        "holds": bar is None or value >= bar,
        "how": f"{how}; {times}, {len(fast)} interleaved pairs, quartiles {low:.2f} to {high:.2f}",
    }


def figure_row(name: str, value: float, unit: str, how: str, at_most: float | None = None) -> Row:
    """A figure, with an upper bar if there is one."""
    return {
        "name": name,
        "value": float(f"{value:.3g}"),
        "unit": unit,
        "bar": None if at_most is None else f"<= {at_most:g}",
        "holds": at_most is None or value <= at_most,
        "how": how,
    }


def count_row(name: str, value: int, of: int, how: str) -> Row:
    """How many of so many, without a bar."""
    return {"name": name, "value": value, "unit": f"of {of}", "bar": None, "holds": True, "how": how}


def write(part: str, rows: Sequence[Row], device: str | None = None, **more: Any) -> None:
    """Writes outputs/bench/<part>.json. `device` names an accelerator; `more` goes into the file as it is."""
    target = FOLDER / f"{part}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    where = machine() | ({"device": device} if device else {})
    content = {"machine": where, "versions": versions(), "rows": list(rows), **more}
    target.write_text(json.dumps(content, indent=2) + "\n")


def publish(part: str, rows: Sequence[Row], device: str | None = None, **more: Any) -> int:
    """Writes as `write` and prints the rows, those that do not hold first; 0 if all bars hold, else 1."""
    write(part, rows, device, **more)
    table = Table("", "name", "value", "unit", "bar", "how")
    for row in sorted(rows, key=lambda row: bool(row["holds"])):
        mark = "[green]holds[/]" if row["holds"] else "[red]FAILS[/]"
        mark = mark if row["bar"] else ""
        table.add_row(mark, row["name"], str(row["value"]), row["unit"], row["bar"] or "", row["how"])
    Console().print(table)
    return 0 if all(row["holds"] for row in rows) else 1
