"""LeRobotDataset v3.0 on disk, written straight: a worker then needs neither lerobot nor torch, a GB and seconds each.

A test holds every file against what lerobot's own writer makes of the same rows.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.stats import KEYS, Stats

VERSION = "v3.0"
CHUNK_FILES = 1000  # files in a folder
DATA_MB, VIDEO_MB = 100, 200  # a file grows no further
INFO, STATS, TASKS = Path("meta/info.json"), Path("meta/stats.json"), Path("meta/tasks.parquet")
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEOS = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
STATE, ACTION = "observation.state", "action"
BOOKKEEPING = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
BOOKKEEPING |= {"task_index": "int64"}

Features = dict[str, dict[str, Any]]


def features_of(layout: Layout, use_videos: bool) -> Features:
    """The features that a layout's rows have, as info.json lists them; those of videos still lack their `info`."""
    kind = "video" if use_videos else "image"
    sides = ["height", "width", "channels"]
    pictures: Features = {
        key: {"dtype": kind, "shape": [height, width, 3], "names": sides}
        for key, (height, width) in layout.cameras.items()
    }
    for key, camera in layout.depth.items():
        depth = {"is_depth_map": True, "depth_unit": "m"}
        pictures[key] = {"dtype": kind, "shape": [camera.height, camera.width, 1], "names": sides, "info": depth}
    vectors: Features = {
        key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
        for key, names in ((STATE, layout.state_names), (ACTION, layout.action_names))
    }
    counters: Features = {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in BOOKKEEPING.items()}
    return pictures | vectors | counters


def of_kind(features: Features, dtype: str) -> list[str]:
    """The keys of the features of one dtype, such as video."""
    return [key for key, feature in features.items() if feature["dtype"] == dtype]


def table_schema(features: Features) -> pa.Schema:
    """The schema of the data files, with the description that the library `datasets` reads."""
    fields: list[tuple[str, pa.DataType]] = []
    described: dict[str, Any] = {}
    for key, feature in features.items():
        if feature["dtype"] == "image":
            fields.append((key, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            described[key] = {"_type": "Image"}
        elif feature["dtype"] != "video":
            value = {"dtype": feature["dtype"], "_type": "Value"}
            kind, (length,) = pa.type_for_alias(feature["dtype"]), feature["shape"]
            fields.append((key, kind if length == 1 else pa.list_(kind, length)))
            described[key] = value if length == 1 else {"feature": value, "length": length, "_type": "List"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """(N,) or (N, D) values as a table's column."""
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), type=kind)
    return pa.array(values.reshape(-1), kind)


def write_info(root: Path, fps: int, robot_type: str | None, features: Features, totals: tuple[int, int, int]) -> None:
    """meta/info.json; `totals`: episodes, frames, tasks."""
    episodes, frames, tasks = totals
    info = {
        "codebase_version": VERSION,
        "fps": fps,
        "features": features,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": DATA_MB,
        "video_files_size_in_mb": VIDEO_MB,
        "data_path": DATA,
        "video_path": VIDEOS if of_kind(features, "video") else None,
        "robot_type": robot_type,
        "splits": {"train": f"0:{episodes}"},
    }
    (root / INFO).parent.mkdir(parents=True, exist_ok=True)
    (root / INFO).write_text(json.dumps(info, indent=4, ensure_ascii=False))


def write_tasks(root: Path, tasks: Sequence[str]) -> None:
    """meta/tasks.parquet: each task's number is its place."""
    (root / TASKS).parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(tasks, name="task")).to_parquet(
        root / TASKS, write_page_checksum=True
    )


def write_stats(root: Path, stats: Mapping[str, Stats]) -> None:
    """meta/stats.json."""
    plain = {feature: {key: value.tolist() for key, value in each.items()} for feature, each in stats.items()}
    (root / STATS).write_text(json.dumps(plain, indent=4))


def write_episodes(root: Path, episodes: Sequence[Mapping[str, Any]]) -> None:
    """meta/episodes: a row each, as `episode_row` makes it."""
    path = root / EPISODES.format(chunk_index=0, file_index=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist([dict(episode) for episode in episodes]),
        path,
        compression="snappy",
        write_page_checksum=True,
    )


def episode_row(
    index: int, tasks: Sequence[str], rows: tuple[int, int], places: Mapping[str, Any], stats: Mapping[str, Stats]
) -> dict[str, Any]:
    """An episode in meta/episodes. `rows`: its first and the one behind its last; `places`: its files, see below."""
    first, end = rows
    return {
        "episode_index": index,
        "tasks": list(tasks),
        "length": end - first,
        "data/chunk_index": places["data"][0],
        "data/file_index": places["data"][1],
        "dataset_from_index": first,
        "dataset_to_index": end,
        **{name: value for name, value in places.items() if name.startswith("videos/")},
        **{f"stats/{key}/{kind}": each[kind].tolist() for key, each in stats.items() for kind in KEYS},
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def video_place(key: str, chunk: int, file: int, first: int, frames: int, fps: int) -> dict[str, Any]:
    """Where an episode's video is, for `episode_row`: the frames from `first` on of that file, in exact seconds."""
    return {
        f"videos/{key}/chunk_index": chunk,
        f"videos/{key}/file_index": file,
        f"videos/{key}/from_timestamp": first / fps,
        f"videos/{key}/to_timestamp": (first + frames) / fps,
    }


def episode_stats(row: Mapping[str, Any], features: Features) -> dict[str, Stats]:
    """The statistics that an episode's row of meta/episodes carries."""
    return {key: {kind: np.asarray(row[f"stats/{key}/{kind}"]) for kind in KEYS} for key in features}
