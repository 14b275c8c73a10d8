"""Charts of a report as SVG text: curves with axes, chunks over what was recorded, points. No script, no picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

LINES = 8  # colours; the ninth curve has the first's again
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 20, 34

STYLE = """
.chart svg{height:auto;overflow:visible}.chart text{fill:var(--soft);font-size:11px}
.chart .grid{stroke:var(--line);stroke-width:1}.chart .axis{stroke:var(--soft);stroke-width:1}
.chart polyline{stroke-width:2}.chart .mark{stroke:var(--soft);stroke-dasharray:3 4}
.chart circle{fill:var(--c0);fill-opacity:.45}
:root{--c0:#2563ad;--c1:#d2600a;--c2:#1a7346;--c3:#8b3fa8;--c4:#b42318;--c5:#0f7f8c;--c6:#7a6a1e;--c7:#63666b}
@media(prefers-color-scheme:dark){:root{--c0:#6aa5ea;--c1:#f29a4c;--c2:#6fcf97;--c3:#c792ea;--c4:#f2897f;--c5:#5fc6d2;
--c6:#cdbb66;--c7:#9a9ea5}}
.l0{stroke:var(--c0)}.l1{stroke:var(--c1)}.l2{stroke:var(--c2)}.l3{stroke:var(--c3)}.l4{stroke:var(--c4)}
.l5{stroke:var(--c5)}.l6{stroke:var(--c6)}.l7{stroke:var(--c7)}
.chart .chunk{stroke:var(--c1);stroke-width:1;stroke-opacity:.45}.chart .recorded{stroke:var(--ink);stroke-width:1.8}
.legend{font-size:13px;color:var(--soft);margin:6px 0 0}.legend i{display:inline-block;width:18px;height:3px;
border-radius:2px;vertical-align:middle;margin:0 6px 0 14px}.legend i:first-child{margin-left:0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:14px 18px}
td.heat{text-align:right;padding:4px 7px;border-bottom:1px solid var(--card)}
"""


@dataclass(frozen=True)
class Line:
    """A curve: its name in the legend, and its points; a gap where y is NaN."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class _Frame:
    """A chart's area: from data to pixels."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> str:
        return f"{self.across(x):.1f},{self.up(y):.1f}"

    def across(self, x: float) -> float:
        low, high = self.x
        return _LEFT + (x - low) / (high - low) * (self.width - _LEFT - _RIGHT)

    def up(self, y: float) -> float:
        low, high = self.y
        return self.height - _BOTTOM - (y - low) / (high - low) * (self.height - _TOP - _BOTTOM)


def curves(
    lines: Sequence[Line], x_label: str, y_label: str, mark: tuple[float, str] | None = None, height: int = 280
) -> str:
    """Curves from 0 up, with a legend; `mark`: a place on x and what it says."""
    frame = _frame([line.x for line in lines], [np.append(line.y, 0.0) for line in lines], 760, height)
    drawn = "".join(_polylines(frame, line.x, line.y, f"l{number % LINES}") for number, line in enumerate(lines))
    legend = "".join(
        f'<i style="background:var(--c{number % LINES})"></i>{escape(line.name)}' for number, line in enumerate(lines)
    )
    body = _axes(frame, x_label, y_label) + drawn + (_mark(frame, *mark) if mark is not None else "")
    return f'<div class="chart">{_svg(frame, body)}<div class="legend">{legend}</div></div>'


def chunks(time: np.ndarray, recorded: np.ndarray, drawn: Sequence[tuple[np.ndarray, np.ndarray]], y_label: str) -> str:
    """What was recorded over time, (N,), and predicted chunks of it, each with its times; in light lines below it."""
    every = [recorded, *(values for _, values in drawn)]
    frame = _frame([time, *(times for times, _ in drawn)], every, 340, 170)
    lines = "".join(_polylines(frame, times, values, "chunk") for times, values in drawn)
    body = _axes(frame, "s", y_label) + lines + _polylines(frame, time, recorded, "recorded")
    return f'<div class="chart">{_svg(frame, body)}</div>'


def points(x: np.ndarray, y: np.ndarray, x_label: str, y_label: str) -> str:
    """A dot for each (x, y), both axes from 0."""
    frame = _frame([np.append(x, 0.0)], [np.append(y, 0.0)], 560, 320)
    dots = "".join(
        f'<circle cx="{frame.across(a):.1f}" cy="{frame.up(b):.1f}" r="3"/>' for a, b in zip(x, y, strict=True)
    )
    return f'<div class="chart">{_svg(frame, _axes(frame, x_label, y_label) + dots)}</div>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(x: Sequence[np.ndarray], y: Sequence[np.ndarray], width: int, height: int) -> _Frame:
    return _Frame(width, height, _span(x), _span(y))


def _span(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([np.asarray(each, dtype=float).ravel() for each in arrays])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)


def _polylines(frame: _Frame, x: np.ndarray, y: np.ndarray, name: str) -> str:
    parts, part = [], []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(b):
            part.append(frame.place(a, b))
        elif part:
            parts.append(part)
            part = []
    return "".join(f'<polyline class="{name}" points="{" ".join(each)}"/>' for each in [*parts, part] if each)


def _axes(frame: _Frame, x_label: str, y_label: str) -> str:
    right, bottom = frame.width - _RIGHT, frame.height - _BOTTOM
    across = "".join(
        f'<path class="grid" d="M{_LEFT} {frame.up(at):.1f}H{right}"/>'
        f'<text x="{_LEFT - 6}" y="{frame.up(at) + 4:.1f}" text-anchor="end">{at:g}</text>'
        for at in ticks(*frame.y, most=5)
    )
    along = "".join(
        f'<text x="{frame.across(at):.1f}" y="{bottom + 14}" text-anchor="middle">{at:g}</text>'
        for at in ticks(*frame.x)
    )
    names = f'<text x="{right}" y="{bottom + 28}" text-anchor="end">{escape(x_label)}</text>'
    if y_label:
        names += f'<text x="{_LEFT}" y="{_TOP - 10}">{escape(y_label)}</text>'
    return f'{across}{along}<path class="axis" d="M{_LEFT} {bottom}H{right}"/>{names}'


def _mark(frame: _Frame, at: float, text: str) -> str:
    x = frame.across(at)
    return (
        f'<path class="mark" d="M{x:.1f} {_TOP}V{frame.height - _BOTTOM}"/>'
        f'<text x="{x + 5:.1f}" y="{frame.height - _BOTTOM - 6}">{escape(text)}</text>'
    )


def _svg(frame: _Frame, body: str) -> str:
    return f'<svg viewBox="0 -4 {frame.width} {frame.height + 4}" role="img">{body}</svg>'


def heat(value: float, least: float, most: float) -> str:
    """A table cell's style: the more, the stronger."""
    share = 0.0 if most <= least else (value - least) / (most - least)
    return f"background:color-mix(in srgb,var(--c1) {100 * min(max(share, 0.0), 1.0) * 0.7:.0f}%,transparent)"
