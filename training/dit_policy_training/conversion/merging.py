"""Shards joined into one LeRobotDataset v3.0, in the given order, in one pass: each byte is read and written once.

lerobot's own `aggregate_datasets` reads and writes the growing files again for each shard it adds, and adds up the
videos' durations, which drift. Here frames are counted, and a thousand shards cost a thousand times what one costs.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dit_policy_training.conversion import lerobot_format as lerobot
from dit_policy_training.conversion import stats
from dit_policy_training.conversion.videos import check_count, frames_in, join_videos, signature

MB = 1024**2


class MergeError(ValueError):
    """Shards that do not fit one another, or one that is incomplete; names the shard and the difference."""


def merge_shards(shards: Sequence[Path], folder: Path) -> None:
    """Make the dataset `folder`, which must not exist yet, of the shards' episodes; an error on the way removes it.

    Tasks are numbered in the order in which they appear. Raises MergeError, VideoError or OSError.
    """
    if not shards:
        raise MergeError("no shards to merge; expected at least one")
    parts = [_Shard.load(path) for path in shards]
    for part in parts[1:]:
        _check_alike(parts[0], part)
    folder.mkdir(parents=True)
    try:
        _merge(parts, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Shard:
    """A dataset to be joined: its info.json, its tasks in order, and its rows of meta/episodes."""

    root: Path
    info: dict[str, Any]
    tasks: list[str]
    episodes: list[dict[str, Any]]

    @classmethod
    def load(cls, root: Path) -> Self:
        try:
            info = json.loads((root / lerobot.INFO).read_text())
            tasks = pd.read_parquet(root / lerobot.TASKS)
            tables = [pq.read_table(path) for path in sorted((root / "meta/episodes").glob("*/*.parquet"))]
        except (OSError, ValueError, KeyError) as error:  # pyarrow's are ValueErrors
            raise MergeError(f"{root} is no complete dataset: {error}; convert its bag again") from error
        episodes = [row for table in tables for row in table.to_pylist()]
        frames = sum(row["length"] for row in episodes)
        if (len(episodes), frames) != (info["total_episodes"], info["total_frames"]):
            said = f"{info['total_episodes']} episodes of {info['total_frames']} frames"
            found = f"{len(episodes)} of {frames}"
            raise MergeError(f"{root}: info.json says {said}, meta/episodes has {found}; convert its bag again")
        return cls(root, info, tasks.sort_values("task_index").index.to_list(), episodes)

    def files(self, prefix: str) -> list[tuple[tuple[int, int], list[dict[str, Any]]]]:
        """(chunk, file) -> its episodes, in order; prefix `data` or `videos/<key>`."""
        found: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in self.episodes:
            found.setdefault((row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]), []).append(row)
        return sorted(found.items())


def _check_alike(first: _Shard, other: _Shard) -> None:
    def compared(shard: _Shard) -> dict[str, Any]:
        return {name: shard.info[name] for name in ("codebase_version", "fps", "robot_type", "features")}

    if different := list(_differences(compared(first), compared(other))):
        listed = "".join(f"\n  {name}: {there!r}, expected {here!r}" for name, here, there in different)
        raise MergeError(
            f"{other.root} does not fit {first.root}:{listed}\nconvert both with the same embodiment and options"
        )


def _differences(here: Any, there: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(here, dict) and isinstance(there, dict):
        for key in here | there:
            yield from _differences(here.get(key), there.get(key), f"{name}.{key}" if name else key)
    elif here != there:
        yield name, here, there


def _merge(parts: Sequence[_Shard], folder: Path) -> None:
    info = parts[0].info
    features: lerobot.Features = info["features"]
    tasks = list(dict.fromkeys(task for part in parts for task in part.tasks))
    places, numbers = _merge_tables(parts, folder, features, tasks)
    for key in lerobot.of_kind(features, "video"):
        for place, video in zip(places, _merge_videos(parts, folder, key, info["fps"]), strict=True):
            place |= video
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, stats.Stats]] = []
    first = 0
    for row, place, counted in zip((row for part in parts for row in part.episodes), places, numbers, strict=True):
        measured.append(lerobot.episode_stats(row, features) | counted)
        span = (first, first + row["length"])
        rows.append(lerobot.episode_row(len(rows), row["tasks"], span, place, measured[-1]))
        first += row["length"]
    lerobot.write_info(folder, info["fps"], info["robot_type"], features, (len(rows), first, len(tasks)))
    lerobot.write_tasks(folder, tasks)
    lerobot.write_episodes(folder, rows)
    lerobot.write_stats(folder, stats.pooled(measured))


class _Tables:
    """The data files: episode after episode, a new file where one gets too large. Also which episode went where."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self._folder, self._schema = folder, schema
        self._number = -1  # of the file
        self._file: BinaryIO | None = None
        self._writer: pq.ParquetWriter | None = None

    def begin_episode(self) -> tuple[int, int]:
        """Chunk and file of the episode that begins."""
        if self._file is None or self._file.tell() >= lerobot.DATA_MB * MB:
            self.close()
            self._number += 1
            chunk, file = divmod(self._number, lerobot.CHUNK_FILES)
            path = self._folder / lerobot.DATA.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
            self._writer = pq.ParquetWriter(
                self._file, self._schema, compression="snappy", use_dictionary=True, write_page_checksum=True
            )
        return divmod(self._number, lerobot.CHUNK_FILES)

    def write(self, rows: pa.Table) -> None:
        assert self._writer is not None, "an episode was begun"
        self._writer.write_table(rows)

    def close(self) -> None:
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.close()


def _merge_tables(
    parts: Sequence[_Shard], folder: Path, features: lerobot.Features, tasks: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, stats.Stats]]]:
    """Places of all episodes in the data files, and the statistics of what merging numbers anew."""
    numbers = {task: number for number, task in enumerate(tasks)}
    places: list[dict[str, Any]] = []
    measured: list[dict[str, stats.Stats]] = []
    frames = 0
    tables = _Tables(folder, lerobot.table_schema(features))
    try:
        for part in parts:
            renumber = np.array([numbers[task] for task in part.tasks])
            for rows, row in zip(_episode_tables(part), part.episodes, strict=True):
                anew = _Renumbered(len(places), frames, renumber)
                places.append({"data": tables.begin_episode()})
                for some in rows:
                    tables.write(anew.rows(some))
                if anew.count != row["length"]:
                    raise MergeError(f"{part.root}: {anew.count} rows for an episode of {row['length']}; convert again")
                measured.append(anew.stats())
                frames += anew.count
    finally:
        tables.close()
    return places, measured


class _Renumbered:
    """The columns of one episode that count the dataset's episodes, rows and tasks, for its new place."""

    def __init__(self, episode: int, first: int, tasks: np.ndarray):
        self._episode, self._first, self._tasks = episode, first, tasks
        self._task_index: list[np.ndarray] = []
        self.count = 0

    def rows(self, rows: pa.Table) -> pa.Table:
        """The episode's next rows, with the columns replaced."""
        task_index = self._tasks[rows["task_index"].to_numpy()]
        self._task_index.append(task_index)
        span = np.arange(self.count, self.count + len(rows))
        self.count += len(rows)
        for key, values in self._columns(span, task_index).items():
            rows = rows.set_column(rows.column_names.index(key), key, pa.array(values, pa.int64()))
        return rows

    def stats(self) -> dict[str, stats.Stats]:
        """Of these columns, over the whole episode."""
        columns = self._columns(np.arange(self.count), np.concatenate(self._task_index))
        return {key: stats.of_values(values[:, None]) for key, values in columns.items()}

    def _columns(self, span: np.ndarray, task_index: np.ndarray) -> dict[str, np.ndarray]:
        episode = np.full(len(span), self._episode)
        return {"episode_index": episode, "index": self._first + span, "task_index": task_index}


def _episode_tables(part: _Shard) -> Iterator[Iterator[pa.Table]]:
    """The rows of each episode, a bounded number at a time; each episode's are to be read before the next one's."""
    pieces = _pieces(part)
    held: list[tuple[int, pa.Table]] = []

    def of_episode(number: int) -> Iterator[pa.Table]:
        while True:
            if not held:
                try:
                    held.append(next(pieces))
                except StopIteration:
                    return
            if held[0][0] != number:
                return
            yield held.pop()[1]

    for row in part.episodes:
        yield of_episode(row["episode_index"])


def _pieces(part: _Shard) -> Iterator[tuple[int, pa.Table]]:
    """The rows in order, as (episode, some of its rows)."""
    for (chunk, file), _ in part.files("data"):
        for rows in _row_groups(part.root / lerobot.DATA.format(chunk_index=chunk, file_index=file)):
            episode = rows["episode_index"].to_numpy()
            starts = [0, *(np.flatnonzero(np.diff(episode)) + 1).tolist(), len(episode)]
            for first, end in pairwise(starts):
                yield int(episode[first]), rows.slice(first, end - first)


def _row_groups(path: Path) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path) as table:
            for group in range(table.num_row_groups):
                yield table.read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        raise MergeError(f"{path} cannot be read: {error}; convert its bag again") from error


def _merge_videos(parts: Sequence[_Shard], folder: Path, key: str, fps: int) -> list[dict[str, Any]]:
    """The places of all episodes of one camera."""
    sources = [
        (part.root / lerobot.VIDEOS.format(video_key=key, chunk_index=chunk, file_index=file), episodes)
        for part in parts
        for (chunk, file), episodes in part.files(f"videos/{key}")
    ]
    places: list[dict[str, Any]] = []
    for number, group in enumerate(_groups(sources)):
        chunk, file = divmod(number, lerobot.CHUNK_FILES)
        target = folder / lerobot.VIDEOS.format(video_key=key, chunk_index=chunk, file_index=file)
        target.parent.mkdir(parents=True, exist_ok=True)
        counts = _joined([path for path, _ in group], target, fps)
        before = 0
        for (path, episodes), count in zip(group, counts, strict=True):
            check_count(path, count, sum(row["length"] for row in episodes))
            for row in episodes:
                first = before + round(row[f"videos/{key}/from_timestamp"] * fps)
                places.append(lerobot.video_place(key, chunk, file, first, row["length"], fps))
            before += count
    return places


def _groups[T](sources: Sequence[tuple[Path, T]]) -> Iterator[list[tuple[Path, T]]]:
    """Neighbours that one file takes: of one signature, and together not too large."""
    group: list[tuple[Path, T]] = []
    size, kind = 0, None
    for path, episodes in sources:
        its_size, its_kind = path.stat().st_size, signature(path)
        if group and (its_kind != kind or size + its_size > lerobot.VIDEO_MB * MB):
            yield group
            group, size = [], 0
        group.append((path, episodes))
        size, kind = size + its_size, its_kind
    if group:
        yield group


def _joined(sources: Sequence[Path], target: Path, fps: int) -> list[int]:
    if len(sources) > 1:
        return join_videos(sources, target, fps)
    shutil.copyfile(sources[0], target)
    return [frames_in(target)]
