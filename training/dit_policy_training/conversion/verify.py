"""Checks a finished dataset: reloaded by LeRobot itself, and held against what was sampled before it was written.

Always: the tables' order, every joint and action bit for bit, every task, the encoded frames in every video, the
statistics, and, by LeRobotDataset, a few frames of each episode, the last one among them, with their timestamps and
pictures. `full`: every frame too, against the bags read once more.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_policy_training.conversion.evidence import EpisodeEvidence, EvidenceError, ShardEvidence
from dit_policy_training.conversion.findings import Findings
from dit_policy_training.conversion.reloaded import Reloaded
from dit_policy_training.conversion.verify_packets import check_videos
from dit_policy_training.conversion.verify_pictures import Expected, check_all_frames, check_kept_frames
from dit_policy_training.conversion.verify_statistics import check_statistics

Reread = Callable[[Path], Iterable[Any]]  # a shard to the sampler's events (Row, EpisodeEnd) of its bag


@dataclass(frozen=True)
class Verification:
    """What was found: a sentence for each problem, none if the dataset is sound; and what was compared, JSON types."""

    problems: list[str]
    figures: dict[str, Any]


def verify(dataset: Path, shards: Sequence[Path], mode: str, reread: Reread | None = None) -> Verification:
    """Check a dataset that was merged from `shards`, in that order; mode "full", "sample" or "off".

    "full" calls `reread` for each shard; without it (bags out of reach) every frame is compared with the shard's own.
    """
    if mode == "off":
        return Verification([], {"mode": mode})
    findings = Findings()
    expected = _expected(shards, findings)
    opened = _opened(dataset, findings)
    if opened is not None:
        _check_promises(opened, shards, findings)
        _check_numbering(opened, findings)
        check_videos(opened, shards, findings)
        check_statistics(opened, findings)
        if _same_episodes(opened, expected, findings):
            _check_vectors(opened, expected, findings)
            _check_tasks(opened, expected, findings)
            if mode == "full":
                check_all_frames(opened, shards, reread, findings)
            else:
                check_kept_frames(opened, expected, findings)
    return Verification(findings.problems, {"mode": mode, "problems": findings.counts.total(), **findings.figures})


def _opened(root: Path, findings: Findings) -> Reloaded | None:
    try:
        return Reloaded.open(root)
    except Exception as error:  # whatever LeRobot and its libraries raise for what they cannot read
        findings.add("loading", f"{root}: LeRobot cannot load it: {type(error).__name__}: {error}; convert again")
        return None


def _expected(shards: Sequence[Path], findings: Findings) -> list[Expected]:
    episodes: list[Expected] = []
    for shard in shards:
        try:
            for evidence in ShardEvidence.load(shard).episodes:
                episodes.append(Expected(len(episodes), shard.name, evidence))
        except EvidenceError as error:
            findings.add("evidence", str(error))
    return episodes


def _check_promises(opened: Reloaded, shards: Sequence[Path], findings: Findings) -> None:
    """What info.json says: how many episodes, and of each feature the same as the shards say, its names in order."""
    said = json.loads((opened.root / "meta" / "info.json").read_text())
    if said["total_episodes"] != len(opened.episodes):
        wrong = f"{said['total_episodes']} episodes, meta/episodes has {len(opened.episodes)}"
        findings.add("info", f"info.json promises {wrong}; convert again")
    for shard in shards:
        try:
            info = json.loads((shard / "meta" / "info.json").read_text())
        except (OSError, ValueError):
            continue  # told where its evidence is asked for, or by the merge
        for key in sorted({*said["features"], *info["features"]}):
            here, there = (_nature(one["features"].get(key, {})) for one in (said, info))
            if here != there:
                findings.add("info", f"info.json: {key} is {here}, {shard.name} has {there}; convert again")


def _nature(feature: dict[str, Any]) -> str:
    return ", ".join(f"{name} {feature.get(name)}" for name in ("dtype", "shape", "names"))


def _check_numbering(opened: Reloaded, findings: Findings) -> None:
    """The columns that number rows, frames and episodes, and the time of each row."""
    lengths = [int(episode["length"]) for episode in opened.episodes]
    findings.figures |= {"episodes": len(lengths), "frames": len(opened.table)}
    if sum(lengths) != len(opened.table):
        wrong = f"{len(opened.table)} rows in data/, the episodes of meta/ have {sum(lengths)}; convert again"
        findings.add("rows", wrong)
        return
    ends = np.cumsum(lengths)
    for column, places in (("dataset_from_index", ends - lengths), ("dataset_to_index", ends)):
        for number, place in enumerate(places):  # by which LeRobot cuts its windows of time
            if (said := int(opened.episodes[number][column])) != place:
                wrong = f"episode {number}: {column} in meta/episodes is {said}, expected {place}; convert again"
                findings.add("episodes", wrong)
    frames = np.concatenate([np.arange(length) for length in lengths])
    due = {
        "index": np.arange(len(frames)),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "frame_index": frames,
        "timestamp": (frames / opened.fps).astype(np.float32),
    }
    for column, values in due.items():
        found = opened.table[column].to_numpy()
        for row in np.flatnonzero(np.abs(found - values) > 1e-5):
            findings.add(column, f"row {row}: {column} is {found[row]}, expected {values[row]}; convert again")


def _same_episodes(opened: Reloaded, expected: list[Expected], findings: Findings) -> bool:
    """Whether the episodes can be compared one by one: as many, each as long."""
    if len(opened.episodes) != len(expected):
        wrong = f"{len(opened.episodes)} episodes, the shards hold {len(expected)}; convert again"
        findings.add("episodes", wrong)
        return False
    same = True
    for episode in expected:
        rows, sampled = opened.rows(episode.number), episode.evidence.frames
        if rows.stop - rows.start != sampled:
            wrong = f"{episode}: {rows.stop - rows.start} rows, {sampled} were sampled; convert again"
            findings.add("episodes", wrong)
            same = False
    return same


def _check_vectors(opened: Reloaded, expected: list[Expected], findings: Findings) -> None:
    for key in opened.vector_keys:
        for episode in expected:
            try:
                sampled = episode.evidence.vector(key)
            except (EvidenceError, OSError, KeyError) as error:
                findings.add("evidence", f"{episode}: what was sampled of {key} is not there: {error}")
                continue
            _compare_vector(opened, episode, key, sampled, findings)
    findings.figures["values_compared"] = sum(opened.vector(key).size for key in opened.vector_keys)


def _compare_vector(opened: Reloaded, episode: Expected, key: str, sampled: np.ndarray, findings: Findings) -> None:
    found = opened.vector(key)[opened.rows(episode.number)]
    if found.shape != sampled.shape:
        wrong = f"{episode}: {key} is {found.shape[1]} long, {sampled.shape[1]} were sampled; convert again"
        findings.add(key, wrong)
        return
    names = opened.names(key)
    for frame, column in np.argwhere(found.view(np.uint32) != sampled.view(np.uint32)):  # bit for bit
        findings.add(
            key,
            f"{episode}, frame {frame}: {key} of {names[column]} is {found[frame, column]}, "
            f"{sampled[frame, column]} was sampled; convert again",
        )


def _check_tasks(opened: Reloaded, expected: list[Expected], findings: Findings) -> None:
    found = opened.table["task_index"].to_numpy()
    for episode in expected:
        due = _tasks_by_frame(episode.evidence)
        shown = [opened.tasks.get(int(index), f"no task {index}") for index in found[opened.rows(episode.number)]]
        for frame, (here, there) in enumerate(zip(shown, due, strict=True)):
            if here != there:
                wrong = f"{episode}, frame {frame}: the task is '{here}', '{there}' was sampled; convert again"
                findings.add("tasks", wrong)
        listed = sorted(opened.episodes[episode.number]["tasks"])
        if listed != sorted(set(due)):
            wrong = f"{episode}: meta/episodes lists the tasks {listed}, expected {sorted(set(due))}; convert again"
            findings.add("tasks", wrong)


def _tasks_by_frame(evidence: EpisodeEvidence) -> list[str]:
    ends = [first for first, _ in evidence.tasks[1:]] + [evidence.frames]
    return [task for (first, task), end in zip(evidence.tasks, ends, strict=True) for _ in range(end - first)]
