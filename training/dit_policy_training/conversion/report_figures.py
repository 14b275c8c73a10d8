"""The numbers that a report tells, from the dataset's tables and from its conversion.json; JSON types only."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.conversion.reloaded import Reloaded

STATE, ACTION = "observation.state", "action"
BINS = 32
EQUAL = 1e-6  # rad or m: an action that near to the state measured at its row is no command
AT_LIMIT = 0.01  # of a joint's range
DIGITS = 6  # of what is told


def figures_of(opened: Reloaded, conversion: Mapping[str, Any], verified: Mapping[str, Any] | None) -> dict[str, Any]:
    """All figures but the warnings and those of pictures."""
    embodiment = Embodiment.load(opened.root / "embodiment.yaml")
    episodes = list(_episodes(opened, conversion))
    relative = is_relative(conversion.get("settings", {}))
    return {
        "dataset": {
            "name": opened.root.name.removeprefix(".").removesuffix(".partial"),
            "robot": embodiment.name,
            "fps": opened.fps,
            "episodes": len(opened.episodes),
            "frames": len(opened.table),
            "seconds": rounded(len(opened.table) / opened.fps),
            "bytes": sum(path.stat().st_size for path in _data_files(opened.root)),
            "cameras": {key: list(opened.features[key]["shape"]) for key in opened.cameras},
        },
        "verified": dict(verified or conversion.get("verified") or {"mode": "off"}),
        "converter": dict(conversion.get("converter", {})),
        "settings": dict(conversion.get("settings", {})),
        "tasks": _tasks(opened),
        "lengths": _histogram(np.array([episode["seconds"] for episode in episodes])),
        "vectors": {
            key: _vector(opened, key, {} if key == ACTION and relative else _limits(embodiment))
            for key in opened.vector_keys
        },
        # Offsets are no positions: near to the state by chance alone.
        "agreement": {} if relative else _agreement(opened, embodiment.state.joints),
        "bags": [_bag(bag) for bag in conversion.get("bags", [])],
        "episodes": episodes,
    }


def _data_files(root: Path) -> Iterator[Path]:
    for folder in ("data", "meta", "videos"):
        yield from (path for path in (root / folder).rglob("*") if path.is_file())


def read_conversion(root: Path) -> dict[str, Any]:
    """The dataset's conversion.json; empty for a dataset that convert did not make."""
    path = root / "conversion.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def is_relative(settings: Mapping[str, Any]) -> bool:
    """Whether actions are offsets from the measured joints, by the settings of a conversion.json."""
    return bool(settings.get("vectors", {}).get("action_mode") == "relative")


def rounded(value: float) -> float:
    """To DIGITS significant digits: the same text wherever it was computed."""
    return float(f"{float(value):.{DIGITS}g}")


def _bag(bag: Mapping[str, Any]) -> dict[str, Any]:
    """A bag without its kept episodes, which stand with the dataset's."""
    account = bag.get("account") or {}
    kept = ("seconds", "warm_up", "warm_up_stream", "trimmed", "trimmed_stream", "idle_trimmed", "streams", "gaps")
    left_out = [episode for episode in account.get("episodes", []) if episode["left_out"] is not None]
    return {
        "name": Path(bag["path"]).name,
        "path": bag["path"],
        "sha256": bag.get("sha256"),
        "refused": bag.get("refused"),
        "episodes": list(bag["episodes"]),
        **{key: account[key] for key in kept if key in account},
        "left_out": [{key: episode[key] for key in ("start", "seconds", "left_out")} for episode in left_out],
        "notes": list(account.get("notes", [])),
    }


def _episodes(opened: Reloaded, conversion: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    accounts = dict(_accounts(conversion))
    task_index = opened.table["task_index"].to_numpy()
    for number in range(len(opened.episodes)):
        rows = opened.rows(number)
        tasks = task_index[rows]
        changes = [0, *(np.flatnonzero(np.diff(tasks)) + 1).tolist()]
        bag, account = accounts.get(number, ({}, {}))
        told = ("start", "idle_share", "idle_start", "idle_end", "peak_speed", "ages")
        yield {
            "episode": number,
            "bag": Path(bag["path"]).name if bag else None,
            "frames": rows.stop - rows.start,
            "seconds": rounded((rows.stop - rows.start) / opened.fps),
            "tasks": [[first, opened.tasks[int(tasks[first])]] for first in changes],
            **{key: account[key] for key in told if key in account},
            "gaps": _near(account, (bag.get("account") or {}).get("gaps", [])),
            "rates": {s["name"]: s["rate"] for s in (bag.get("account") or {}).get("streams", [])},
        }


def _accounts(conversion: Mapping[str, Any]) -> Iterator[tuple[int, tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """(dataset's episode, (its bag, its account))."""
    for bag in conversion.get("bags", []):
        account = bag.get("account") or {}
        kept = [episode for episode in account.get("episodes", []) if episode["left_out"] is None]
        for position, number in enumerate(bag["episodes"]):
            yield number, (bag, kept[position] if position < len(kept) else {})


def _near(account: Mapping[str, Any], gaps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gaps that begin or end an episode, to a second."""
    if not account:
        return []
    first, last = account["start"] - 1.0, account["start"] + account["seconds"] + 1.0
    return [gap for gap in gaps if gap["end"] >= first and gap["start"] <= last]


def _tasks(opened: Reloaded) -> list[dict[str, Any]]:
    """By number of frames, the most first."""
    task_index = opened.table["task_index"].to_numpy()
    episode_index = opened.table["episode_index"].to_numpy()
    tasks = [
        {
            "task": task,
            "episodes": len(np.unique(episode_index[task_index == index])),
            "frames": int((task_index == index).sum()),
            "seconds": rounded(float((task_index == index).sum()) / opened.fps),
        }
        for index, task in sorted(opened.tasks.items())
    ]
    return sorted(tasks, key=lambda task: -int(str(task["frames"])))


def _vector(opened: Reloaded, key: str, limits: Mapping[str, tuple[float, float, float]]) -> list[dict[str, Any]]:
    """Of each value: its spread, its histogram, its limits, how often it is at one, and how often it is too fast."""
    values = opened.vector(key)
    inner = np.diff(opened.table["episode_index"].to_numpy()) == 0
    told = []
    for column, name in enumerate(opened.names(key)):
        series = values[:, column].astype(np.float64)
        steps = np.abs(np.diff(series))[inner]
        entry = {
            "name": name,
            "mean": rounded(series.mean()),
            "std": rounded(series.std()),
            "largest_step": rounded(steps.max(initial=0.0)),
            "still": rounded(float((steps < EQUAL).mean()) if len(steps) else 1.0),
            **_histogram(series),
        }
        if name in limits:
            low, high, speed = limits[name]
            margin = AT_LIMIT * (high - low)
            entry |= {
                "limits": [low, high],
                "speed_limit": speed,
                "at_limit": rounded(float(((series <= low + margin) | (series >= high - margin)).mean())),
                "too_fast": rounded(float((steps * opened.fps > 1.5 * speed).mean()) if len(steps) else 0.0),
            }
        told.append(entry)
    return told


def _limits(embodiment: Embodiment) -> dict[str, tuple[float, float, float]]:
    """(lowest, highest position, speed) by joint."""
    limits = {}
    for group in embodiment.action_groups:
        for joint, limit in group.joints.items():
            limits[joint] = (float(limit.lower), float(limit.upper), float(limit.velocity))
    return limits


def _agreement(opened: Reloaded, joints: Sequence[str]) -> dict[str, float]:
    """Shares of the rows whose action is, in all joints that both have, the state measured then, and one row later.

    Only of the robot's `joints`: where a pose, say, is action and state, it may well be one and the same measurement.
    """
    if STATE not in opened.vector_keys or ACTION not in opened.vector_keys:
        return {}
    columns = {name: column for column, name in enumerate(opened.names(STATE))}
    pairs = [
        (columns[name], column)
        for column, name in enumerate(opened.names(ACTION))
        if name in columns and name in joints
    ]
    if not pairs:
        return {}
    state = opened.vector(STATE)[:, [pair[0] for pair in pairs]]
    action = opened.vector(ACTION)[:, [pair[1] for pair in pairs]]
    inner = np.diff(opened.table["episode_index"].to_numpy()) == 0
    now = np.abs(action - state).max(axis=1) < EQUAL
    later = (np.abs(action[:-1] - state[1:]).max(axis=1) < EQUAL)[inner]
    return {"state": rounded(now.mean()), "next_state": rounded(later.mean() if len(later) else 0.0)}


def _histogram(values: np.ndarray) -> dict[str, Any]:
    low, high = float(values.min()), float(values.max())
    span = (low, high) if high > low else (low - 0.5, high + 0.5)
    counts, edges = np.histogram(values, bins=BINS, range=span)
    return {
        "min": rounded(low),
        "median": rounded(float(np.median(values))),
        "max": rounded(high),
        "counts": counts.tolist(),
        "from": rounded(edges[0]),
        "to": rounded(edges[-1]),
    }
