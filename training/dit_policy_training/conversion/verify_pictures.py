"""Is frame k of a dataset the picture sampled for row k? Frames come by LeRobotDataset, within its tolerance."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_policy_training.conversion.evidence import EpisodeEvidence, EvidenceError
from dit_policy_training.conversion.findings import Findings
from dit_policy_training.conversion.likeness import LOSSLESS, bound, colour_error, fault, psnr
from dit_policy_training.conversion.reloaded import Reel, Reloaded


@dataclass(frozen=True)
class Expected:
    """An episode that the dataset should have."""

    number: int
    shard: str
    evidence: EpisodeEvidence

    def __str__(self) -> str:
        return _name(self.number, self.shard)


@dataclass
class Likeness:
    """PSNR of the frames compared, dB, and their largest error of colour, 0 to 255, by camera."""

    decibels: dict[str, list[float]] = field(default_factory=dict)
    colours: dict[str, list[int]] = field(default_factory=dict)

    def add(self, key: str, found: np.ndarray, sampled: np.ndarray) -> None:
        """Count one frame."""
        if found.shape == sampled.shape:
            self.decibels.setdefault(key, []).append(psnr(found, sampled))
            self.colours.setdefault(key, []).append(colour_error(found, sampled))

    def take(self, other: "Likeness") -> None:
        """Count those of `other`."""
        for key, values in other.decibels.items():
            self.decibels.setdefault(key, []).extend(values)
            self.colours.setdefault(key, []).extend(other.colours[key])

    def figures(self, bounds: Mapping[str, float]) -> dict[str, Any]:
        """For the report: how many were compared, and how like they were."""
        return {
            "pictures_compared": sum(map(len, self.decibels.values())),
            "psnr_db": {key: _spread(values, bounds[key]) for key, values in self.decibels.items()},
            "colour_error": {key: round(float(np.percentile(values, 90)), 1) for key, values in self.colours.items()},
        }


def check_kept_frames(opened: Reloaded, expected: list[Expected], findings: Findings) -> None:
    """The frames whose pictures were kept as evidence."""
    likeness = Likeness()
    for episode in expected:
        reel = Reel(opened, episode.number)
        for frame in episode.evidence.pictures:
            _check_kept(opened, reel, episode, frame, likeness, findings)
    findings.figures |= likeness.figures(_bounds(opened))


def _check_kept(
    opened: Reloaded, reel: Reel, episode: Expected, frame: int, likeness: Likeness, findings: Findings
) -> None:
    if not _gives(reel, str(episode), frame, findings):
        return
    for key in opened.cameras:
        try:
            sampled = episode.evidence.picture(key, frame)
        except EvidenceError as error:
            findings.add("evidence", f"{episode}: {error}")
            continue
        apart = [LOSSLESS if value is None else value for value in _beside(episode.evidence, key, frame)]
        _compare(opened, reel, f"{episode}, frame {frame}", frame, key, sampled, apart, likeness, findings)


def _beside(evidence: EpisodeEvidence, key: str, frame: int) -> list[float | None]:
    return evidence.beside.get(key, {}).get(str(frame), [])


def check_all_frames(
    opened: Reloaded,
    shards: Sequence[Path],
    reread: Callable[[Path], Iterable[Any]] | None,
    findings: Findings,
) -> None:
    """Every row of the bags once more, or, where they are out of reach, every row of the shards."""
    likeness, number = Likeness(), 0
    for shard in shards:
        try:
            events = _rows_of(shard) if reread is None else reread(shard)
            for found, alike in _compared(opened, shard.name, number, events, exact=reread is None):
                findings.take(found)
                likeness.take(alike)
                number += 1
        except ValueError as error:
            source = "it" if reread is None else "its bag"
            findings.add("bags", f"{shard.name}: {source} cannot be read again: {error}")
            return
    if number != len(opened.episodes):
        wrong = f"read again, there are {number} episodes, the dataset has {len(opened.episodes)}; convert again"
        findings.add("episodes", wrong)
    findings.figures |= likeness.figures(_bounds(opened))


def _compared(
    opened: Reloaded, shard: str, number: int, events: Iterable[Any], exact: bool
) -> Iterator[tuple[Findings, Likeness]]:
    """What is wrong with each kept episode of a shard. Whether it is kept is known only at its end."""
    findings, likeness, frame, reel = Findings(), Likeness(), 0, Reel(opened, number)
    for before, event, after in _with_neighbours(events):
        if not hasattr(event, "reason"):
            if frame < len(reel):
                beside = [row for row in (before, after) if row is not None]
                _compare_row(opened, reel, _name(number, shard), frame, event, beside, exact, likeness, findings)
            frame += 1
            continue
        if event.reason is None:
            if frame != len(reel):
                wrong = f"{_name(number, shard)}: {len(reel)} rows, read again {frame}; convert again"
                findings.add("episodes", wrong)
            yield findings, likeness
            number += 1
        findings, likeness, frame, reel = Findings(), Likeness(), 0, Reel(opened, number)


def _with_neighbours(events: Iterable[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Each event with the row before and the row after it in its episode, None where there is none."""
    before = current = None
    for event in events:
        if current is not None:
            yield before, current, None if hasattr(event, "reason") else event
            before = None if hasattr(current, "reason") else current
        current = event
    if current is not None:
        yield before, current, None


def _compare_row(
    opened: Reloaded,
    reel: Reel,
    name: str,
    frame: int,
    row: Any,
    beside: Sequence[Any],
    exact: bool,
    likeness: Likeness,
    findings: Findings,
) -> None:
    if not _gives(reel, name, frame, findings):
        return
    sample, where = reel.sample(frame), f"{name}, frame {frame}"
    if sample["task"] != row.task:
        findings.add("tasks", f"{where}: the task is '{sample['task']}', read again '{row.task}'; convert again")
    for key in opened.vector_keys:
        again = row.action if key == "action" else row.frame[key]
        for column in np.flatnonzero(sample[key].numpy() != np.asarray(again, np.float32)):
            findings.add(
                key,
                f"{where}: {key} of {opened.names(key)[column]} is {sample[key][column]}, read again {again[column]}; "
                "convert again",
            )
    for key in opened.cameras:
        if exact and not np.array_equal(reel.picture(key, frame), row.frame[key]):
            findings.add(key, f"{where}: {key} is not the shard's picture; merge again")
        elif not exact:
            sampled = row.frame[key]
            apart = [] if opened.is_depth(key) else [psnr(sampled, other.frame[key]) for other in beside]
            _compare(opened, reel, where, frame, key, sampled, apart, likeness, findings)


@dataclass(frozen=True)
class _ShardRow:
    task: str
    frame: dict[str, Any]
    action: Any


@dataclass(frozen=True)
class _ShardEpisodeEnd:
    reason: None = None


def _rows_of(shard: Path) -> Iterator[Any]:
    """A shard's rows as LeRobot reads them, pictures decoded."""
    opened = Reloaded.open(shard)
    for number in range(len(opened.episodes)):
        reel = Reel(opened, number)
        for frame in range(len(reel)):
            sample = reel.sample(frame)
            values = {key: sample[key].numpy() for key in opened.vector_keys}
            values |= {key: reel.picture(key, frame) for key in opened.cameras}
            yield _ShardRow(sample["task"], values, values.get("action"))
        yield _ShardEpisodeEnd()


def _gives(reel: Reel, name: str, frame: int, findings: Findings) -> bool:
    """Whether LeRobot gives the frame at all: within its tolerance of the row's timestamp."""
    try:
        reel.sample(frame)
    except Exception as error:  # LeRobot's and its decoders' own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        findings.add("timestamps", f"{name}, frame {frame}: LeRobot does not give it: {reason}; convert again")
        return False
    return True


def _compare(
    opened: Reloaded,
    reel: Reel,
    where: str,
    frame: int,
    key: str,
    sampled: np.ndarray,
    apart: Sequence[float],
    likeness: Likeness,
    findings: Findings,
) -> None:
    found, feature = reel.picture(key, frame), opened.features[key]
    if opened.is_depth(key):
        wrong = _depth_fault(found, sampled, feature)
    else:
        likeness.add(key, found, sampled)
        wrong = fault(found, sampled, reel.beside(key, frame), apart, bound(feature))
    if wrong:
        findings.add(key, f"{where}: {key}: {wrong}. Look at the frame; if it is wrong, convert again")


def _depth_fault(found: np.ndarray, sampled: np.ndarray, feature: Mapping[str, Any]) -> str | None:
    """Against what LeRobot's own quantisation makes of the sampled depth: its video keeps that losslessly."""
    due = _quantised(sampled, feature)
    if found.shape != due.shape:
        return f"its size is {found.shape}, expected {due.shape}"
    wrong = np.abs(found - due) > 1e-4 * due + 1e-3
    if not wrong.any():
        return None
    at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return f"{wrong.mean():.1%} of the depths differ, the first is {found[at]:.2f} mm, expected {due[at]:.2f} mm"


def _quantised(sampled: np.ndarray, feature: Mapping[str, Any]) -> np.ndarray:
    """(H, W) float32, mm, as the dataset keeps it."""
    import torch
    from lerobot.configs import DepthEncoderConfig
    from lerobot.datasets.depth_utils import dequantize_depth, quantize_depth

    if feature["dtype"] != "video":
        return np.squeeze(sampled if sampled.dtype == np.uint16 else sampled * 1000.0).astype(np.float32)
    config = DepthEncoderConfig.from_video_info(feature.get("info"))
    how = {name: getattr(config, name) for name in ("depth_min", "depth_max", "shift", "use_log")}
    codes = quantize_depth(sampled, **how, video_backend=None)
    metres = dequantize_depth(torch.from_numpy(codes.astype(np.int32))[None], **how, output_unit="mm")
    return np.squeeze(np.asarray(metres)).astype(np.float32)


def _bounds(opened: Reloaded) -> dict[str, float]:
    return {key: bound(opened.features[key]) for key in opened.cameras}


def _spread(values: list[float], least: float) -> dict[str, Any]:
    """JSON knows no infinity: lossless cameras say so."""
    finite = [value for value in values if value != LOSSLESS]
    return {
        "frames": len(values),
        "identical": len(values) - len(finite),
        "min": round(min(finite), 2) if finite else None,
        "median": round(float(np.median(finite)), 2) if finite else None,
        "bound": None if least == LOSSLESS else round(least, 2),
    }


def _name(number: int, shard: str) -> str:
    return f"episode {number} (of {shard})"
