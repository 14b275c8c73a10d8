"""The report on a dataset: report.html to look at, report.json with the same figures, both in the dataset's folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_policy_training.conversion.reloaded import Reloaded
from dit_policy_training.conversion.report_figures import (
    ACTION,
    STATE,
    figures_of,
    is_relative,
    read_conversion,
    rounded,
)
from dit_policy_training.conversion.report_page import Drawn, page
from dit_policy_training.conversion.report_pictures import Strip, strips_of
from dit_policy_training.conversion.report_warnings import Caution, warnings_of

DRAWN = 100  # episodes that are drawn; the table has all


def write_report(dataset: Path, verification: Mapping[str, Any] | None = None) -> list[str]:
    """Write report.html and report.json; returns the warnings, a sentence or two each.

    `verification`: the figures of verify. A dataset without conversion.json is reported on as far as its tables go.
    """
    opened = Reloaded.open(dataset)
    figures = figures_of(opened, read_conversion(dataset), verification)
    looked_at = _evenly(range(len(opened.episodes)), DRAWN)
    strips = {number: strips_of(opened, number) for number in looked_at}
    _add_looks(figures, strips)
    cautions = warnings_of(figures)
    chosen = _chosen(len(opened.episodes), cautions)
    relative = is_relative(figures["settings"])
    drawn = {
        number: Drawn(strips.get(number) or strips_of(opened, number), _series(opened, number, relative))
        for number in chosen
    }
    document = {**figures, "warnings": [caution.as_json() for caution in cautions], "drawn": chosen}
    _write(dataset / "report.json", json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write(dataset / "report.html", page(figures, cautions, drawn))
    return [caution.sentence for caution in cautions]


def _add_looks(figures: dict[str, Any], strips: Mapping[int, Sequence[Strip]]) -> None:
    for number, seen in strips.items():
        figures["episodes"][number]["cameras"] = {
            strip.camera: {"brightness": rounded(strip.brightness), "frozen": strip.frozen} for strip in seen
        }


def _chosen(episodes: int, cautions: Sequence[Caution]) -> list[int]:
    """All, or DRAWN of them: half for the ones with the most warnings, the rest evenly over the dataset."""
    if episodes <= DRAWN:
        return list(range(episodes))
    counts = np.zeros(episodes, int)
    for caution in cautions:
        if len(caution.episodes) < episodes:
            counts[caution.episodes] += 1
    worst = [int(number) for number in np.argsort(-counts, kind="stable")[: DRAWN // 2] if counts[number]]
    others = _evenly([number for number in range(episodes) if number not in set(worst)], DRAWN - len(worst))
    return sorted([*worst, *others])


def _evenly(numbers: Sequence[int], count: int) -> list[int]:
    places = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return [numbers[int(place)] for place in places]


def _series(opened: Reloaded, episode: int, relative: bool) -> dict[str, list[tuple[str, np.ndarray]]]:
    """What a joint was measured and commanded to be, in one plot; the state's order first.

    `relative`: actions are offsets, which have plots of their own.
    """
    series: dict[str, list[tuple[str, np.ndarray]]] = {}
    for key, kind in ((STATE, "s"), (ACTION, "a")):
        if key in opened.vector_keys:
            values = opened.vector(key)[opened.rows(episode)]
            for column, name in enumerate(opened.names(key)):
                plot = f"{name}, relative" if relative and key == ACTION else name
                series.setdefault(plot, []).append((kind, values[:, column].astype(np.float64)))
    return series


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
