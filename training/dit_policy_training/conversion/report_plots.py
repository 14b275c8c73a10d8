"""Small drawings in SVG, as text: curves over an episode, histograms. Coordinates are whole numbers, to stay small."""

from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 240, 60  # of a curve's box; it is stretched to the page
BUCKETS = 80  # a curve keeps the least and the largest value of each, so that no spike is lost
MANY = 14  # plots an episode; with more, half as many buckets


def curves(series: Sequence[tuple[str, np.ndarray]], many: bool = False) -> tuple[str, float, float]:
    """(SVG, lowest, highest value) of (class, values) over one time; `many` draws them coarser."""
    low = min(float(values.min()) for _, values in series)
    high = max(float(values.max()) for _, values in series)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    lines = "".join(
        f'<polyline class="{name}" points="{_points(values, low, high, BUCKETS // 2 if many else BUCKETS)}"/>'
        for name, values in series
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{lines}</svg>', low, high


def _points(values: np.ndarray, low: float, high: float, buckets: int) -> str:
    count = len(values)
    kept = range(count) if count <= 2 * buckets else _extremes(values, buckets)
    step = WIDTH / max(count - 1, 1)
    heights = HEIGHT - 2 - (values - low) / (high - low) * (HEIGHT - 4)
    return " ".join(f"{_short(k * step)},{_short(heights[k])}" for k in kept)


def _extremes(values: np.ndarray, buckets: int) -> list[int]:
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), buckets):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return sorted(kept)


def bars(counts: Sequence[int], marks: Sequence[float] = ()) -> str:
    """A histogram; `marks` are places along its width, 0 to 1, drawn as lines."""
    most = max(max(counts), 1)
    width = WIDTH / len(counts)
    path = "".join(
        f"M{_short(k * width)} {HEIGHT}v-{_short(max(count / most * (HEIGHT - 2), 1.5))}h{_short(width - 1)}V{HEIGHT}z"
        for k, count in enumerate(counts)
        if count
    )
    lines = "".join(f'<path class="mark" d="M{_short(at * WIDTH)} 0V{HEIGHT}"/>' for at in marks if 0 <= at <= 1)
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none"'
    return f'<svg class="bars" {box}><path class="fill" d="{path}"/>{lines}</svg>'


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
