"""One dataset's rows without the pictures, read from its tables and checked against all that it says of itself."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dit_policy_ros.policy.configuration import ACTION, ENVIRONMENT_STATE, STATE
from dit_policy_training.data.errors import DatasetError
from dit_policy_training.data.features import Features

_COUNTERS = ("episode_index", "frame_index", "index", "task_index")
_LATE = 0.1  # of a frame's duration: how far a timestamp may be off


@dataclass(frozen=True)
class Rows:
    """One dataset's rows, N in all; a vector that it does not have is 0 wide."""

    tasks: list[str]
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32
    environment: np.ndarray  # (N, E) float32
    task_index: np.ndarray  # (N,)
    episode_start: np.ndarray  # (N,) row where the row's episode starts
    episode_end: np.ndarray  # (N,) and one past its last


def load_rows(root: Path, features: Features) -> Rows:
    """Raises DatasetError for files that are missing or damaged, and for rows that contradict each other."""
    _check_absolute(root)
    widths = {
        STATE: len(features.state_names),
        ACTION: len(features.action_names),
        ENVIRONMENT_STATE: len(features.environment_names),
    }
    keys = [key for key, width in widths.items() if width]
    table = pa.concat_tables(
        [read_parquet(path, [*keys, "timestamp", *_COUNTERS]) for path in data_files(root, features)]
    )
    counters = {key: _counter(root, table, key) for key in _COUNTERS}
    episode = counters["episode_index"]
    if len(episode) != features.total_frames:
        raise DatasetError(
            f"{root}: {len(episode)} rows in data/, meta/info.json promises {features.total_frames}; "
            "a file is missing or unfinished: take the dataset from its source again"
        )
    _check_order(root, counters)
    start, end = (np.searchsorted(episode, episode, side=side) for side in ("left", "right"))
    _check_counters(root, counters, start)
    _check_times(root, _numbers(root, table, "timestamp"), counters, features.fps)
    vectors = {key: _vectors(root, table, key, width) for key, width in widths.items()}
    for key in keys:
        _check_finite(root, key, vectors[key], counters)
    tasks = _read_tasks(root, counters)
    return Rows(tasks, vectors[STATE], vectors[ACTION], vectors[ENVIRONMENT_STATE], counters["task_index"], start, end)


def _check_absolute(root: Path) -> None:
    """Whether the converter was asked for relative actions, whose names are those of absolute ones."""
    path = root / "conversion.json"
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        mode = document.get("settings", {}).get("vectors", {}).get("action_mode", "absolute")
    except (OSError, ValueError, AttributeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; convert the bags again") from error
    if mode != "absolute":
        raise DatasetError(
            f"{root} was converted with --vectors.action_mode={mode}, and the node would take its actions for "
            "positions; convert with absolute ones, and let the trainer make them relative (--policy.action_mode)"
        )


def data_files(root: Path, features: Features) -> list[Path]:
    """The files of a dataset's table, in the order of its rows. Raises DatasetError if there is none."""
    folder = root / Path(features.data_path).parts[0]
    found = sorted(folder.glob("chunk-*/file-*.parquet"), key=_number)
    if not found:
        raise DatasetError(f"{root} has no rows: {folder} holds no chunk-*/file-*.parquet; take the dataset again")
    return found


def _number(path: Path) -> tuple[int, int, str]:
    """A file's place: chunk and file number, which have more digits in datasets of more than 1000 files."""
    chunk, file = path.parent.name.removeprefix("chunk-"), path.stem.removeprefix("file-")
    return (int(chunk) if chunk.isdecimal() else 0, int(file) if file.isdecimal() else 0, str(path))


def read_parquet(path: Path, columns: list[str]) -> pa.Table:
    """Some columns of a file. Raises DatasetError naming the file, and a column that it lacks."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # the converter writes them
            lacking = [name for name in columns if name not in file.schema_arrow.names]
            if lacking:
                raise DatasetError(f"{path} has no column {', '.join(lacking)}: meta/info.json promises it")
            return file.read(columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path} cannot be read, it is damaged or cut short: {error}; take it from the dataset's source again"
        ) from error


def _column(root: Path, table: pa.Table, key: str) -> pa.Array:
    column = table.column(key).combine_chunks()
    if column.null_count:
        row = column.is_null().to_numpy(zero_copy_only=False).argmax()
        raise DatasetError(f"{root}: {key} is empty in row {row}; every row needs a value")
    return column


def _numbers(root: Path, table: pa.Table, key: str) -> np.ndarray:
    column = _column(root, table, key)
    if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):  # [N] of one number
        column = column.flatten()
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)) or len(column) != len(table):
        raise DatasetError(f"{root}: {key} holds {table.schema.field(key).type}, a number a row is needed")
    return column.to_numpy(zero_copy_only=False)


def _counter(root: Path, table: pa.Table, key: str) -> np.ndarray:
    values = _numbers(root, table, key)
    if values.dtype.kind not in "iu":
        raise DatasetError(f"{root}: {key} holds {values.dtype} values, whole numbers are needed")
    return values.astype(np.int64)


def _vectors(root: Path, table: pa.Table, key: str, width: int) -> np.ndarray:
    """(N, width) float32."""
    if not width:
        return np.zeros((len(table), 0), np.float32)
    column = _column(root, table, key)
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if is_list or pa.types.is_fixed_size_list(column.type):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if (lengths != width).any():
            row = int((lengths != width).argmax())
            raise DatasetError(f"{root}: {key} has {lengths[row]} numbers in row {row}, meta/info.json says {width}")
        column = column.flatten()
    if len(column) != len(table) * width:
        raise DatasetError(f"{root}: {key} has {len(column)} numbers for {len(table)} rows of {width}")
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise DatasetError(f"{root}: {key} holds {column.type} values, numbers are needed")
    return column.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), width)


def _check_order(root: Path, counters: dict[str, np.ndarray]) -> None:
    steps = np.diff(counters["episode_index"])
    if (wrong := (steps < 0) | (steps > 1)).any():
        row = int(wrong.argmax())
        before, after = counters["episode_index"][row : row + 2]
        raise DatasetError(
            f"{root}: episode {after} follows episode {before} at row {row + 1}; episodes must stand in order, "
            "each in one piece: rows are missing, or the files are not of one dataset"
        )


def _check_counters(root: Path, counters: dict[str, np.ndarray], start: np.ndarray) -> None:
    rows = np.arange(len(start))
    for key, expected in (("frame_index", rows - start), ("index", rows)):
        if (wrong := counters[key] != expected).any():
            row = int(wrong.argmax())
            raise DatasetError(
                f"{root}: {key} is {counters[key][row]} in row {row} (episode {counters['episode_index'][row]}), "
                f"expected {expected[row]}: rows are missing or out of order"
            )


def _check_times(root: Path, times: np.ndarray, counters: dict[str, np.ndarray], fps: int) -> None:
    late = np.abs(times.astype(np.float64) * fps - counters["frame_index"])
    allowed = _LATE + np.abs(times) * fps * 1e-6  # float32 has seven digits
    if (wrong := ~(late <= allowed)).any():
        row = int(wrong.argmax())
        frame = counters["frame_index"][row]
        raise DatasetError(
            f"{root}: episode {counters['episode_index'][row]}, frame {frame} has the timestamp {times[row]:.4f} s; at "
            f"the {fps} fps of meta/info.json it is {frame / fps:.4f} s"
        )


def _check_finite(root: Path, key: str, values: np.ndarray, counters: dict[str, np.ndarray]) -> None:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = int(finite.argmin())
        raise DatasetError(
            f"{root}: {key} is not finite in episode {counters['episode_index'][row]}, frame "
            f"{counters['frame_index'][row]}: {values[row].tolist()} ({np.count_nonzero(~finite)} such rows); "
            "leave these episodes out, or mend what recorded them"
        )


def _read_tasks(root: Path, counters: dict[str, np.ndarray]) -> list[str]:
    path = root / "meta" / "tasks.parquet"
    if not path.exists():
        raise DatasetError(f"{root} has no instructions: {path} is missing")
    table = read_parquet(path, ["task_index"])
    frame = _task_frame(path)
    numbers = _counter(root, table, "task_index")
    if sorted(numbers) != list(range(len(numbers))) or len(frame) != len(numbers):
        raise DatasetError(f"{path}: task_index is {numbers.tolist()}, expected 0 to {len(numbers) - 1}, each once")
    tasks = [frame[place] for place in np.argsort(numbers)]
    used = counters["task_index"]
    if len(used) and (used.min() < 0 or used.max() >= len(tasks)):
        row = int(((used < 0) | (used >= len(tasks))).argmax())
        raise DatasetError(
            f"{root}: task_index is {used[row]} in row {row} (episode {counters['episode_index'][row]}), "
            f"meta/tasks.parquet has 0 to {len(tasks) - 1}"
        )
    for number in np.unique(used):
        if not tasks[number].strip():
            row = int((used == number).argmax())
            raise DatasetError(
                f"{root}: the instruction of episode {counters['episode_index'][row]} is empty "
                f"(task_index {number} in meta/tasks.parquet); write there what the robot does"
            )
    return tasks


def _task_frame(path: Path) -> list[str]:
    """The texts: LeRobot writes them as the table's index, whose column is `task` or nameless."""
    with pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name != "task_index"]
    if len(names) != 1:
        raise DatasetError(f"{path} has the columns {names} beside task_index, one with the instructions is needed")
    texts = read_parquet(path, names).column(names[0]).to_pylist()
    if not all(isinstance(text, str) for text in texts):
        raise DatasetError(f"{path}: an instruction is no text: {texts}")
    return texts
