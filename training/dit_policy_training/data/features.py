"""What meta/info.json says of a dataset: its rate, its cameras, the names of its state and action."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.configuration import ACTION, ENVIRONMENT_STATE, STATE
from dit_policy_training.data.errors import DatasetError

IMAGES = "observation.images."
FORMAT = "v3.0"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_HEIGHT_WIDTH_CHANNELS, _CHANNELS_HEIGHT_WIDTH = (0, 1, 2), (1, 2, 0)


@dataclass(frozen=True)
class Features:
    """What training uses of a dataset. `notes` name what it does not use, and why, a line each."""

    fps: int
    total_frames: int
    image_shapes: dict[str, tuple[int, int, int]]  # (3, H, W) by key, in the order that a policy sees them
    videos: dict[str, str]  # key -> pattern of its files' paths; a camera that is not here has pictures in the table
    data_path: str  # pattern of the table's files' paths
    state_names: list[str]
    action_names: list[str]
    environment_names: list[str]
    notes: list[str]


def read_features(root: Path, embodiment: Embodiment | None) -> Features:
    """Raises DatasetError for no dataset, another version, and what does not fit the embodiment."""
    info = _read_info(root)
    try:
        return _features(root, info, embodiment)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DatasetError(
            f"{root}/meta/info.json is not as the format {FORMAT} has it: {type(error).__name__} {error}; "
            "take the file from the dataset's source again"
        ) from error


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    if not path.exists():
        raise DatasetError(
            f"{root} is not a LeRobotDataset: {path} is missing. "
            "Make one from bags with python -m dit_policy_training.convert"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; take it from the dataset's source again") from error
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if version != FORMAT:
        raise DatasetError(f"{root} has the format {version}, {FORMAT} is needed; {_how_to_convert(root, version)}")
    return dict(info)


def _how_to_convert(root: Path, version: Any) -> str:
    if version == "v2.1":
        # Unless told not to, LeRobot's script puts its result to the hub and removes files there.
        return (
            "LeRobot converts it: python -m lerobot.scripts.convert_dataset_v21_to_v30 "
            f"--repo-id=local/{root.name} --root={root} --push-to-hub=false"
        )
    if version in ("v1.6", "v2.0"):
        return "first to v2.1 by a LeRobot of that time (its convert_dataset_v20_to_v21.py), then to v3.0 by today's"
    return "a newer dit_policy_training may read it; or take the dataset from its source in the format needed"


def _features(root: Path, info: dict[str, Any], embodiment: Embodiment | None) -> Features:
    features: dict[str, dict[str, Any]] = info["features"]
    notes: list[str] = []
    cameras = _cameras(features, notes)
    if embodiment is not None:
        _check_embodiment(root, info, cameras, embodiment)
        wanted = [IMAGES + camera.name for camera in embodiment.cameras]
        notes += [f"{key} is not used: the embodiment has no such camera" for key in cameras if key not in wanted]
        cameras = {key: cameras[key] for key in wanted}
    used = {*cameras, STATE, ACTION, ENVIRONMENT_STATE, *BOOKKEEPING}
    noted = {note.partition(" ")[0] for note in notes}
    notes += [f"{key} is not used" for key in features if key not in used | noted]
    if ACTION not in features:
        raise DatasetError(f"{root} has no feature {ACTION}, only {', '.join(features)}: there is nothing to learn")
    if not cameras and STATE not in features and ENVIRONMENT_STATE not in features:
        raise DatasetError(f"{root} has no camera and no {STATE}, only {', '.join(features)}: there is nothing to see")
    videos = {key: str(info["video_path"]) for key in cameras if features[key]["dtype"] == "video"}
    return Features(
        fps=_fps(root, info["fps"]),
        total_frames=int(info["total_frames"]),
        image_shapes=cameras,
        videos=videos,
        data_path=str(info["data_path"]),
        state_names=_names(root, features, STATE),
        action_names=_names(root, features, ACTION),
        environment_names=_names(root, features, ENVIRONMENT_STATE),
        notes=notes,
    )


def _fps(root: Path, fps: float) -> int:
    if isinstance(fps, bool) or int(fps) != fps or fps < 1:
        raise DatasetError(f"{root}: meta/info.json has fps {fps}, a whole number of at least 1 is needed")
    return int(fps)


def _cameras(features: dict[str, dict[str, Any]], notes: list[str]) -> dict[str, tuple[int, int, int]]:
    """(3, H, W) of every camera; what is a picture and none of a colour camera goes to the notes."""
    found = {}
    for key, feature in features.items():
        if feature["dtype"] not in ("video", "image"):
            continue
        height, width, channels = (feature["shape"][place] for place in _places(feature))
        details = feature.get("info") or {}
        if details.get("is_depth_map") or details.get("video.is_depth_map"):
            notes.append(f"{key} is not used: it is depth, the policy's encoders take colour")
        elif channels != 3:
            notes.append(f"{key} is not used: it has {channels} channels, the policy's encoders take 3")
        elif not key.startswith("observation.image"):
            notes.append(f"{key} is not used: it is no observation")
        else:
            found[key] = (3, int(height), int(width))
    return found


def _places(feature: dict[str, Any]) -> tuple[int, int, int]:
    """Where height, width and channels stand in a picture's shape."""
    names, shape = feature.get("names"), feature["shape"]
    if isinstance(names, list) and len(names) == 3:
        return _CHANNELS_HEIGHT_WIDTH if str(names[0]).startswith("channel") else _HEIGHT_WIDTH_CHANNELS
    return _CHANNELS_HEIGHT_WIDTH if shape[0] in (1, 3) and shape[2] not in (1, 3) else _HEIGHT_WIDTH_CHANNELS


def _names(root: Path, features: dict[str, dict[str, Any]], key: str) -> list[str]:
    """A vector's names: as a list, as {"motors": [...]}, as {"x": 0, ...}; without any, its place."""
    if key not in features:
        return []
    shape = features[key]["shape"]
    if len(shape) != 1 or shape[0] < 1:
        raise DatasetError(f"{root}: {key} has the shape {shape} in meta/info.json, a vector's [N] is needed")
    names = features[key].get("names")
    if isinstance(names, dict) and all(isinstance(place, int) for place in names.values()):
        names = sorted(names, key=names.__getitem__)
    elif isinstance(names, dict):
        names = [name for group in names.values() for name in group]
    if not isinstance(names, list) or len(names) != shape[0] or not all(isinstance(name, str) for name in names):
        return [f"{key.removeprefix('observation.')}.{index}" for index in range(shape[0])]
    return names


def _check_embodiment(
    root: Path, info: dict[str, Any], cameras: dict[str, tuple[int, int, int]], embodiment: Embodiment
) -> None:
    expected: dict[str, Any] = {"fps": (embodiment.fps, info["fps"])}
    for camera in embodiment.cameras:
        key = IMAGES + camera.name
        expected[key] = ((3, camera.height, camera.width), cameras.get(key))
    for key, joints in ((STATE, embodiment.state.joints), (ACTION, embodiment.action_joints)):
        found = _names(root, info["features"], key) or None
        expected[key] = (list(joints), found)
    wrong = [
        f"{key}: {there if there is not None else 'nothing'} in the dataset, {here} in embodiment.yaml"
        for key, (here, there) in expected.items()
        if here != there
    ]
    if wrong:
        raise DatasetError(f"{root} does not fit its embodiment.yaml:\n  - " + "\n  - ".join(wrong))


def agreeing(parts: list[tuple[str, Features]]) -> Features:
    """The features of several datasets that are trained on together. Raises DatasetError naming what differs."""
    (first_name, first), *others = parts
    compared: dict[str, Callable[[Features], Any]] = {
        "fps": lambda features: features.fps,
        "cameras": lambda features: dict(sorted(features.image_shapes.items())),
        STATE: lambda features: features.state_names,
        ACTION: lambda features: features.action_names,
        ENVIRONMENT_STATE: lambda features: features.environment_names,
    }
    wrong = [
        f"{what}: {value(first)} in {first_name}, {value(other)} in {name}"
        for name, other in others
        for what, value in compared.items()
        if value(first) != value(other)
    ]
    if wrong:
        raise DatasetError(
            "datasets that are trained on together must have the same features:\n  - " + "\n  - ".join(wrong)
        )
    return first
