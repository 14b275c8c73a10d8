"""A shard: what became of one bag, a small complete LeRobotDataset v3.0 of its own.

Rows come in one pass. Pictures go to an encoder thread a camera, numbers wait for the episode's end; an episode that is
not kept leaves nothing. Which threads ran when does not show in the result.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dit_policy_training.conversion import lerobot_format as lerobot
from dit_policy_training.conversion import stats
from dit_policy_training.conversion.depth_codes import DepthCodes
from dit_policy_training.conversion.encoders import Encoder, check_size, colour_encoder, depth_encoder
from dit_policy_training.conversion.evidence import FOLDER, Witness
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.options import VideoOptions
from dit_policy_training.conversion.pictures import CameraPictures, ColourVideo, DepthVideo, PictureFile, Sink
from dit_policy_training.conversion.rows import Row
from dit_policy_training.conversion.videos import VideoFile, check_count, frames_in, join_videos, properties

WORKING = "unfinished"  # a folder in the shard, gone when it is complete
TABLE_ROWS = 64  # of pictures at a time: a minute of them would be a GB


class ShardError(ValueError):
    """A row that does not fit the layout; the message names the feature, what came and what was expected."""


class ShardWriter:
    """Writes episodes into `folder`, which must not exist yet; an error on the way removes it.

    Call `add` for each row, `end` after an episode's last, `close` after the last episode; or use it as a context
    manager. `threads`: the cores to use. `notes`: sentences on how videos were encoded.
    """

    def __init__(self, folder: Path, layout: Layout, video: VideoOptions, threads: int = 1):
        self._folder, self._layout, self._threads = folder, layout, threads
        self._features = lerobot.features_of(layout, video.use_videos)
        self._shapes = _shapes(layout)
        self._encoders = encoders_of(layout, video, threads) if video.use_videos else {}
        self.notes = sorted({encoder.note for encoder in self._encoders.values() if encoder.note})
        self._tasks: dict[str, int] = {}
        self._finished: list[_Finished] = []
        self._episode: _Episode | None = None
        self._table: pq.ParquetWriter | None = None
        self._closed = False
        folder.mkdir(parents=True)
        self._witness = Witness(folder / FOLDER)

    @property
    def frames(self) -> int:
        """Rows of the kept episodes."""
        return sum(episode.frames for episode in self._finished)

    @property
    def episodes(self) -> int:
        """How many episodes were kept."""
        return len(self._finished)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def add(self, row: Row) -> None:
        """Take the episode's next row; waits for the encoders. Its arrays must not change afterwards.

        Raises ShardError for a row that does not fit the layout, VideoError or OSError for what encoding raised.
        """
        if self._episode is None:
            self._episode = _Episode(
                self._folder / WORKING / f"{len(self._finished):06d}", self._layout, self._encoders, self._threads
            )
        self._check(row)
        self._witness.add(row)
        self._episode.add(row)

    def end(self, keep: bool) -> None:
        """The episode is over: written if `keep`, else without a trace. Raises ShardError for one without rows."""
        episode, self._episode = self._episode, None
        if episode is None:
            if keep:
                raise ShardError("an episode without rows cannot be kept")
            return
        if keep:
            try:
                self._finished.append(self._finish(episode))
            except BaseException:
                episode.abandon()
                raise
        else:
            episode.abandon()
        self._witness.end(keep)

    def close(self) -> None:
        """Complete the dataset; without kept episodes there is none, and the folder goes. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._episode is not None:
                raise ShardError("an episode was begun and not ended")
            if self._table is not None:
                self._table.close()
            if self._finished:
                self._complete()
            shutil.rmtree(self._folder / WORKING, ignore_errors=True)
        except BaseException:
            self._abandon()
            raise
        if not self._finished:
            shutil.rmtree(self._folder)

    def _abandon(self) -> None:
        self._closed = True
        if self._episode is not None:
            self._episode.abandon()
            self._episode = None
        with suppress(OSError):  # a full disk once more; the first error is the one to tell
            self._witness.end(False)
        if self._table is not None:
            with suppress(OSError):
                self._table.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _check(self, row: Row) -> None:
        given = {**row.frame, lerobot.ACTION: row.action}
        if given.keys() != self._shapes.keys():
            raise ShardError(f"a row has {', '.join(sorted(given))}; expected {', '.join(sorted(self._shapes))}")
        for key, (shape, dtype) in self._shapes.items():
            value = given[key]
            if value.shape != shape or value.dtype != dtype:
                found, wanted = f"{value.dtype} {value.shape}", f"{dtype} {shape}"
                raise ShardError(f"{key} at {row.stamp_ns} ns is {found}; expected {wanted}")
            depth = key in self._layout.depth  # +inf: farther than the camera sees
            if value.dtype != np.uint8 and not (value > -np.inf if depth else np.isfinite(value)).all():
                raise ShardError(f"{key} at {row.stamp_ns} ns has values that are no finite numbers")

    def _finish(self, episode: "_Episode") -> "_Finished":
        for task in episode.tasks:
            self._tasks.setdefault(task, len(self._tasks))
        before, number = self.frames, len(self._finished)
        count = len(episode.tasks)
        columns = episode.columns() | {
            "timestamp": (np.arange(count) / self._layout.fps).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, number),
            "index": before + np.arange(count),
            "task_index": np.array([self._tasks[task] for task in episode.tasks]),
        }
        pictures = {key: camera.finish() for key, camera in episode.cameras.items()}
        self._write(columns, episode.files)
        numbers = {key: stats.of_values(values.reshape(count, -1)) for key, values in columns.items()}
        measured = {key: pictures.get(key) or numbers[key] for key in self._features}
        return _Finished(count, list(dict.fromkeys(episode.tasks)), measured, episode.folder)

    def _write(self, columns: dict[str, np.ndarray], files: dict[str, PictureFile]) -> None:
        schema = lerobot.table_schema(self._features)
        if self._table is None:
            path = self._folder / lerobot.DATA.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._table = pq.ParquetWriter(path, schema, compression="snappy", use_dictionary=True)
        count = len(columns["index"])
        pictures = {key: _cells(file, key in self._layout.depth) for key, file in files.items()}
        step = TABLE_ROWS if files else count
        for first in range(0, count, step):
            some = range(first, min(first + step, count))
            arrays = [
                pa.array([next(pictures[field.name]) for _ in some], field.type)
                if field.name in pictures
                else lerobot.column(columns[field.name][some.start : some.stop], field.type)
                for field in schema
            ]
            self._table.write_table(pa.Table.from_arrays(arrays, schema=schema))

    def _complete(self) -> None:
        places: list[dict[str, Any]] = [{"data": (0, 0)} for _ in self._finished]
        for key in lerobot.of_kind(self._features, "video"):
            path = self._folder / lerobot.VIDEOS.format(video_key=key, chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True)
            self._join([episode.folder / f"{key}.mp4" for episode in self._finished], path)
            encoded = properties(path) | self._encoders[key].info
            marks = {"is_depth_map": key in self._layout.depth}
            self._features[key]["info"] = self._features[key].get("info", {}) | encoded | marks
            first = 0
            for place, episode in zip(places, self._finished, strict=True):
                place |= lerobot.video_place(key, 0, 0, first, episode.frames, self._layout.fps)
                first += episode.frames
        self._write_meta(places)

    def _join(self, sources: Sequence[Path], target: Path) -> None:
        if len(sources) == 1:
            sources[0].rename(target)
        else:
            counts = join_videos(sources, target, self._layout.fps)
            for source, count, episode in zip(sources, counts, self._finished, strict=True):
                check_count(source, count, episode.frames)
        check_count(target, frames_in(target), self.frames)

    def _write_meta(self, places: Sequence[dict[str, Any]]) -> None:
        first, rows = 0, []
        for number, (episode, place) in enumerate(zip(self._finished, places, strict=True)):
            span = (first, first + episode.frames)
            rows.append(lerobot.episode_row(number, episode.tasks, span, place, episode.stats))
            first += episode.frames
        layout = self._layout
        totals = (self.episodes, self.frames, len(self._tasks))
        lerobot.write_info(self._folder, layout.fps, layout.robot_type, self._features, totals)
        lerobot.write_tasks(self._folder, list(self._tasks))
        lerobot.write_episodes(self._folder, rows)
        lerobot.write_stats(self._folder, stats.pooled([episode.stats for episode in self._finished]))


@dataclass(frozen=True)
class _Finished:
    """A kept episode: its videos still lie in `folder`."""

    frames: int
    tasks: list[str]
    stats: dict[str, stats.Stats]
    folder: Path


class _Episode:
    """The episode that rows come in for."""

    def __init__(self, folder: Path, layout: Layout, encoders: Mapping[str, Encoder], threads: int):
        folder.mkdir(parents=True)
        self.folder = folder
        self.tasks: list[str] = []
        self.cameras: dict[str, CameraPictures] = {}
        self.files: dict[str, PictureFile] = {}  # of pictures that go into the table
        self._vectors: dict[str, list[np.ndarray]] = {lerobot.STATE: [], lerobot.ACTION: []}
        try:
            for key in (*layout.cameras, *layout.depth):
                self._open(key, layout, encoders.get(key), threads)
        except BaseException:
            self.abandon()
            raise

    def _open(self, key: str, layout: Layout, encoder: Encoder | None, threads: int) -> None:
        camera = layout.depth.get(key)
        codes = DepthCodes(camera.depth_min, camera.depth_max) if camera else None
        sink: Sink
        if encoder is None:
            sink = self.files[key] = PictureFile(self.folder / key, camera is not None)
        elif camera:
            video = VideoFile(self.folder / f"{key}.mp4", encoder, layout.fps, camera.height, camera.width)
            sink = DepthVideo(video)
        else:
            sink = ColourVideo(VideoFile(self.folder / f"{key}.mp4", encoder, layout.fps, *layout.cameras[key]))
        self.cameras[key] = CameraPictures(key, sink, codes, threads, raw=encoder is None)

    def add(self, row: Row) -> None:
        for key, camera in self.cameras.items():
            camera.add(row.frame[key])
        self._vectors[lerobot.STATE].append(row.frame[lerobot.STATE])
        self._vectors[lerobot.ACTION].append(row.action)
        self.tasks.append(row.task)

    def columns(self) -> dict[str, np.ndarray]:
        """(N, D) float32 by feature."""
        return {key: np.stack(rows) for key, rows in self._vectors.items()}

    def abandon(self) -> None:
        """Leave nothing."""
        for camera in self.cameras.values():
            camera.abandon()
        shutil.rmtree(self.folder, ignore_errors=True)


def encoders_of(layout: Layout, video: VideoOptions, threads: int = 1) -> dict[str, Encoder]:
    """Each camera's, tried before the first row comes. Raises VideoError for what does not work."""
    encoders = dict.fromkeys(layout.cameras, colour_encoder(video, threads)) if layout.cameras else {}
    encoders |= {key: depth_encoder(camera) for key, camera in layout.depth.items()}
    sizes = layout.cameras | {key: (camera.height, camera.width) for key, camera in layout.depth.items()}
    for key, encoder in encoders.items():
        check_size(encoder, key, *sizes[key])
    return encoders


def _shapes(layout: Layout) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each value of a row."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    shapes |= {key: ((height, width, 3), "uint8") for key, (height, width) in layout.cameras.items()}
    shapes |= {key: ((camera.height, camera.width), "float32") for key, camera in layout.depth.items()}
    shapes[lerobot.STATE] = ((len(layout.state_names),), "float32")
    shapes[lerobot.ACTION] = ((len(layout.action_names),), "float32")
    return shapes


def _cells(file: PictureFile, depth: bool) -> Iterator[dict[str, Any]]:
    """A table's cells of pictures; the names are LeRobot's."""
    for number, data in enumerate(file.read()):
        yield {"bytes": data, "path": f"frame-{number:06d}.{'tiff' if depth else 'png'}"}
