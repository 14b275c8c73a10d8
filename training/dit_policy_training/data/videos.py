"""Where each row's picture is, in video files or in the table, and reading it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow.parquet as pq

from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.rows import data_files, read_parquet
from dit_policy_training.data.table import Part, Table

PTS_TOLERANCE = 0.1  # of a frame's duration
_DECODED_ON = 8  # frames that are decoded on the way to a later one, rather than seeking a key frame
AGAIN = "take it from the dataset's source again, or convert the bags again"


@dataclass(frozen=True)
class Shelf:
    """Where a camera's pictures of one dataset are: row r of it in files[file[r]], there at place[r].

    The place is seconds in a video, or a row of a parquet file.
    """

    key: str
    shape: tuple[int, int, int]  # (3, H, W)
    fps: int
    files: list[Path]
    is_video: bool
    file: np.ndarray  # (rows,)
    place: np.ndarray  # (rows,) float64

    def __len__(self) -> int:
        return len(self.file)


def shelf(table: Table, part: Part, key: str) -> Shelf:
    """Raises DatasetError where meta/episodes and the table do not agree, or a file is missing."""
    shape = table.image_shapes[key]
    if key not in part.features.videos:
        files = data_files(part.root, part.features)
        counts = [_rows_in(path) for path in files]
        if sum(counts) != part.rows:
            raise DatasetError(f"{part.root}: {sum(counts)} pictures of {key} for {part.rows} rows; {AGAIN}")
        file = np.repeat(np.arange(len(files)), counts)
        place = np.concatenate([np.arange(count, dtype=np.float64) for count in counts])
        return Shelf(key, shape, table.fps, files, False, file, place)
    starts, ends = _episodes(table, part)
    names = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    meta = _read_episodes(part.root, [*names, "dataset_from_index", "dataset_to_index"])
    found = (meta["dataset_from_index"], meta["dataset_to_index"])
    if not (np.array_equal(found[0], starts) and np.array_equal(found[1], ends)):
        raise DatasetError(
            f"{part.root}: meta/episodes has {len(found[0])} episodes with {int(np.sum(found[1] - found[0]))} frames, "
            f"the rows of data/ are {len(starts)} episodes with {part.rows}, or they begin elsewhere; {AGAIN}"
        )
    places, number = np.unique(np.stack([meta[names[0]], meta[names[1]]], 1), axis=0, return_inverse=True)
    files = [_video(part, key, int(chunk), int(index)) for chunk, index in places]
    lengths = ends - starts
    offsets = np.arange(part.rows) - np.repeat(starts, lengths)
    seconds = np.repeat(meta[names[2]].astype(np.float64), lengths) + offsets / table.fps
    return Shelf(key, shape, table.fps, files, True, np.repeat(number.reshape(-1), lengths), seconds)


def _episodes(table: Table, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """First rows of a dataset's episodes and the ones past their last, counted from its own first row."""
    rows = slice(part.first, part.first + part.rows)
    return np.unique(table.episode_start[rows]) - part.first, np.unique(table.episode_end[rows]) - part.first


def _read_episodes(root: Path, columns: list[str]) -> dict[str, np.ndarray]:
    paths = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not paths:
        raise DatasetError(f"{root} has no meta/episodes/chunk-*/file-*.parquet: where its videos begin is unknown")
    found: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    order = []
    for path in paths:
        table = read_parquet(path, ["episode_index", *columns])
        values = {name: table.column(name).combine_chunks() for name in ("episode_index", *columns)}
        for name, column in values.items():
            if column.null_count or not np.issubdtype(column.type.to_pandas_dtype(), np.number):
                raise DatasetError(f"{path}: {name} is not a number in every row; {AGAIN}")
        order.append(values["episode_index"].to_numpy())
        for name in columns:
            found[name].append(values[name].to_numpy())
    sorting = np.argsort(np.concatenate(order), kind="stable")
    return {name: np.concatenate(arrays)[sorting] for name, arrays in found.items()}


def _video(part: Part, key: str, chunk: int, index: int) -> Path:
    try:
        name = part.features.videos[key].format(video_key=key, chunk_index=chunk, file_index=index)
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetError(f"{part.root}: video_path of meta/info.json is no pattern of a path: {error}") from error
    if not (part.root / name).exists():
        raise DatasetError(f"{part.root / name} is missing, meta/episodes promises it; {AGAIN}")
    return part.root / name


def _rows_in(path: Path) -> int:
    return int(pq.ParquetFile(path).metadata.num_rows)


class VideoReader:
    """Pictures of one video by their time. Small steps forward decode on; others seek the key frame before them."""

    def __init__(self, path: Path, shelf: Shelf, threads: int = 1):
        """`threads` of the decoder; 0 leaves the number to it. Raises DatasetError for a file that is no video."""
        self._path, self._shape, self._tolerance = path, shelf.shape, PTS_TOLERANCE / shelf.fps
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, OSError, IndexError) as error:
            raise DatasetError(
                f"{path} cannot be opened, it is damaged or no video: {_said(error)}; {AGAIN}"
            ) from error
        self._stream.codec_context.thread_count = threads
        self._stream.codec_context.thread_type = "AUTO"
        self._ahead = _DECODED_ON / shelf.fps
        self._frames: Iterator[av.VideoFrame] = self._container.decode(self._stream)
        self._last: av.VideoFrame | None = None

    def read(self, seconds: float, row: int) -> np.ndarray:
        """(H, W, 3) RGB uint8 at a time. `row` is for messages. Raises DatasetError naming the file and the row."""
        try:
            frame = self._frame(seconds, row)
            picture: np.ndarray = frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, OSError) as error:
            raise DatasetError(
                f"{self._path} is damaged: row {row} at {seconds:.3f} s cannot be decoded: {_said(error)}; {AGAIN}"
            ) from error
        if picture.shape != (*self._shape[1:], 3):
            raise DatasetError(
                f"{self._path} has pictures of {picture.shape[1]}x{picture.shape[0]}, meta/info.json promises "
                f"{self._shape[2]}x{self._shape[1]}; {AGAIN}"
            )
        return picture

    def _frame(self, seconds: float, row: int) -> av.VideoFrame:
        if not self._is_ahead(seconds):
            self._container.seek(
                int((seconds + self._tolerance) / (self._stream.time_base or 1)), stream=self._stream, backward=True
            )
            self._frames, self._last = self._container.decode(self._stream), None
        frame = self._last
        while frame is None or frame.time is None or frame.time < seconds - self._tolerance:
            frame = next(self._frames, None)
            if frame is None:
                raise DatasetError(f"{self._path} ends before row {row} at {seconds:.3f} s; {AGAIN}")
            self._last = frame
        if frame.time > seconds + self._tolerance:
            raise DatasetError(
                f"{self._path} has no frame for row {row} at {seconds:.3f} s, the next is at {frame.time:.3f} s; "
                + AGAIN
            )
        if frame.is_corrupt:
            raise DatasetError(f"{self._path} is damaged: row {row} at {seconds:.3f} s is incomplete; {AGAIN}")
        return frame

    def _is_ahead(self, seconds: float) -> bool:
        """Whether the picture is soon reached by decoding on."""
        here = 0.0 if self._last is None or self._last.time is None else self._last.time
        return here - self._tolerance <= seconds <= here + self._ahead

    def close(self) -> None:
        """Close the file."""
        self._container.close()


class PictureReader:
    """Pictures of one parquet file by their row there."""

    def __init__(self, path: Path, shelf: Shelf):
        self._path, self._key, self._shape = path, shelf.key, shelf.shape
        self._column = read_parquet(path, [shelf.key]).column(shelf.key).combine_chunks()

    def read(self, place: float, row: int) -> np.ndarray:
        """(H, W, 3) RGB uint8. Raises DatasetError naming the file and the row."""
        cell = self._column[int(place)].as_py()
        data = cell.get("bytes") if isinstance(cell, Mapping) else None
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
        if picture is None or picture.shape != (*self._shape[1:], 3):
            found = "nothing that can be decoded" if picture is None else f"{picture.shape[1]}x{picture.shape[0]}"
            raise DatasetError(
                f"{self._path}: the picture {self._key} of row {row} is {found}, meta/info.json promises "
                f"{self._shape[2]}x{self._shape[1]}; {AGAIN}"
            )
        return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))

    def close(self) -> None:
        """Nothing is open."""


def open_file(shelf: Shelf, file: int, threads: int = 1) -> VideoReader | PictureReader:
    """The reader of one of a shelf's files."""
    if shelf.is_video:
        return VideoReader(shelf.files[file], shelf, threads)
    return PictureReader(shelf.files[file], shelf)


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
