"""Three ways from a bag to a LeRobotDataset, each with what it needs and nothing else; all get the same rows."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dit_policy_training.conversion.bag_to_shard import convert_bag, sampled
from dit_policy_training.conversion.checking import check_options
from dit_policy_training.conversion.jobs import Job
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.lerobot_format import BOOKKEEPING, features_of
from dit_policy_training.conversion.manifest import ShardRecord
from dit_policy_training.conversion.merging import merge_shards
from dit_policy_training.conversion.options import ConvertConfig, VideoOptions
from dit_policy_training.conversion.sampling import EpisodeEnd
from dit_policy_training.conversion.verify import verify
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from dit_policy_ros.embodiment import Embodiment

ROOM = 100_000  # pictures: lerobot's queue drops one that waits for 100 ms, and dropping costs nothing


@dataclass(frozen=True)
class Work:
    """A bag, what is asked for, and a folder that does not exist yet for what comes of it."""

    bag: Path
    embodiment: Embodiment
    video: VideoOptions
    folder: Path

    @property
    def config(self) -> ConvertConfig:
        """The converter's options."""
        return ConvertConfig(str(self.bag), self.folder / "unused.yaml", self.folder / "dataset", video=self.video)


def cpu_seconds() -> float:
    """Of this process and of the children it has waited for, user and system."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def ours(work: Work) -> int:
    """Everything the converter does of a bag: hash, shard with its evidence, checks, dataset. Returns the frames."""
    check_options(work.config)
    job = Job(
        number=0,
        bag=work.bag,
        given=work.bag,
        size=0,
        config=work.config,
        embodiment=work.embodiment,
        shards=work.folder / "shards",
        part="all",
        threads=1,
    )
    (work.folder / "shards").mkdir(parents=True)
    record = convert_bag(job, lambda _: None)
    if not isinstance(record, ShardRecord):
        raise RuntimeError(f"{work.bag} was not converted: {record}")
    merge_shards([record.folder], work.folder / "dataset")
    return record.frames


def ours_verified(work: Work) -> int:
    """The same, and the verifier's sample, as a run does it."""
    frames = ours(work)
    (shard,) = (work.folder / "shards").glob("[!.]*")
    checked = verify(work.folder / "dataset", [shard], "sample")
    if checked.problems:
        raise RuntimeError(f"the dataset of {work.bag} is not sound: {checked.problems}")
    return frames


def lerobots(work: Work, streaming: bool) -> int:
    """lerobot's own writer: `add_frame` with PNG files that are encoded at the episode's end, or its streaming mode."""
    layout = Layout.of(work.config, work.embodiment)
    video = work.config.video
    preset = int(video.preset) if video.preset.isdigit() else video.preset
    encoder = RGBEncoderConfig(video.codec, video.pix_fmt, video.gop, video.crf, preset)
    features = {key: {**each, "shape": tuple(each["shape"])} for key, each in features_of(layout, True).items()}
    dataset = LeRobotDataset.create(
        "local/bench",
        layout.fps,
        {key: each for key, each in features.items() if key not in BOOKKEEPING},
        root=work.folder / "dataset",
        robot_type=layout.robot_type,
        video_backend="pyav",
        image_writer_threads=0 if streaming else 4,
        rgb_encoder=encoder,
        streaming_encoding=streaming,
        encoder_queue_maxsize=ROOM,
    )
    frames = 0
    for event in sampled(work.bag, work.config, work.embodiment):
        if isinstance(event, EpisodeEnd):
            dataset.save_episode()
        else:
            dataset.add_frame({**event.frame, "action": event.action, "task": event.task})
            frames += 1
    dataset.finalize()
    return frames


WAYS: dict[str, Callable[[Work], int]] = {
    "the converter": ours,
    "the converter, verified": ours_verified,
    "LeRobot, streaming": lambda work: lerobots(work, streaming=True),
    "LeRobot, PNG files": lambda work: lerobots(work, streaming=False),
}


def cpu_per_frame(way: str, work: Work) -> float:
    """CPU seconds a frame of all cameras; what was written is checked to be there, and removed."""
    before = cpu_seconds()
    frames = WAYS[way](work)
    spent = cpu_seconds() - before
    try:
        written = LeRobotDataset("local/bench", root=work.folder / "dataset", video_backend="pyav")
        if not frames == len(written) > 0:
            raise RuntimeError(f"{way}: {len(written)} rows in the dataset for {frames} frames")
    finally:
        shutil.rmtree(work.folder)
    return spent / frames


def limit_cores(cores: int) -> Callable[[], None]:
    """For a child process: the first `cores` of this one's."""
    mine = sorted(os.sched_getaffinity(0))[:cores]
    return lambda: os.sched_setaffinity(0, mine)
