"""Text on coloured cells that can be read."""

from collections.abc import Sequence

BLACK, WHITE = "black", "white"
_CROSSING = 0.179  # luminance at which both have the same contrast: sqrt(1.05 * 0.05) - 0.05, by WCAG 2


def legible_on(background: Sequence[float]) -> str:
    """Black or white, whichever has the greater contrast with (r, g, b, ...) in [0, 1], by WCAG 2's luminance."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return BLACK if luminance > _CROSSING else WHITE
