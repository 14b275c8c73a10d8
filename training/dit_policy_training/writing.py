"""Writing a LeRobotDataset v3 through lerobot's own API: complete and under its final name, or not there at all."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import datasets
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.dataset import DatasetError
from dit_policy_training.episodes import EpisodeError, Row
from dit_policy_training.video import VideoEncoder, VideoOptions, frames_in

MIN_ROWS = 2  # lerobot keeps no video statistics of a single frame


def features(embodiment: Embodiment, use_videos: bool) -> dict[str, dict[str, Any]]:
    """The dataset's features: cameras, state and action, with the joints' names."""
    images = {
        f"observation.images.{camera.name}": {
            "dtype": "video" if use_videos else "image",
            "shape": (camera.height, camera.width, 3),
            "names": ["height", "width", "channels"],
        }
        for camera in embodiment.cameras
    }
    vectors = {"observation.state": embodiment.state.joints, "action": embodiment.action_joints}
    return images | {
        key: {"dtype": "float32", "shape": (len(joints),), "names": list(joints)} for key, joints in vectors.items()
    }


class DatasetWriter:
    """Writes episodes into `folder` (which must not exist), one after the other."""

    def __init__(self, folder: Path, embodiment: Embodiment, use_videos: bool, video: VideoOptions):
        # Both would write over the progress bar: lerobot resets libav's log to its default after every file.
        av.logging.set_libav_level(av.logging.ERROR)
        datasets.disable_progress_bars()
        self._dataset = LeRobotDataset.create(
            repo_id=f"local/{folder.name.strip('.')}",
            root=folder,
            fps=embodiment.fps,
            robot_type=embodiment.name,
            features=features(embodiment, use_videos),
            use_videos=use_videos,
            video_backend="pyav",  # torchcodec wants the system's ffmpeg
            image_writer_threads=0 if use_videos else 2,
        )
        if use_videos:
            encoder = video.encoder_config()
            self._dataset.writer._rgb_encoder = encoder  # what info.json will say
            self._dataset.writer._streaming_encoder = VideoEncoder(embodiment.fps, encoder)
        (folder / "embodiment.yaml").write_text(embodiment.to_yaml())
        self._folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the files; on the way out of an error the unfinished episode is forgotten first."""
        if kind is not None:
            self._dataset.clear_episode_buffer()
        self._dataset.finalize()
        if kind is None and self._dataset.meta.video_keys:
            self._check_frame_counts()

    @property
    def frames(self) -> int:
        """Rows of the finished episodes."""
        return int(self._dataset.meta.total_frames)

    def write(self, rows: Iterable[Row]) -> None:
        """Write one episode. A failure on the way, in `rows` or here, leaves no trace of the episode."""
        tasks: dict[str, None] = {}
        count = 0
        try:
            for row in rows:
                self._dataset.add_frame({**row.frame, "action": row.action, "task": row.task})
                tasks[row.task] = None
                count += 1
            if count < MIN_ROWS:
                raise EpisodeError(f"only {count} ticks of 1/fps from the start of the last stream to the end")
        except BaseException:
            self._dataset.clear_episode_buffer()
            raise
        # In order of appearance: lerobot's own list(set(tasks)) changes with the hash seed.
        self._dataset.meta.save_episode_tasks(list(tasks))
        self._dataset.save_episode()

    def _check_frame_counts(self) -> None:
        """Raises DatasetError if an mp4 holds more or fewer frames than the table has rows for it."""
        meta = LeRobotDatasetMetadata(self._dataset.repo_id, root=self._folder)
        for key in meta.video_keys:
            rows: dict[Path, int] = {}
            for episode in meta.episodes:
                path = self._folder / meta.get_video_file_path(episode["episode_index"], key)
                rows[path] = rows.get(path, 0) + episode["length"]
            for path, expected in rows.items():
                if (encoded := frames_in(path)) != expected:
                    raise DatasetError(f"{path}: {encoded} frames encoded for {expected} rows; convert again")


@contextmanager
def replacing(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name once the body is through; else it is removed.

    Raises DatasetError if `output` exists and `overwrite` is not given: before the work, not after it.
    """
    if output.exists() and not overwrite:
        raise DatasetError(f"{output} exists; give --overwrite=true to replace it, or another --output")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
