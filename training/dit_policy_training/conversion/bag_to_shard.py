"""One bag to one shard, in a worker: recording -> sampler -> writer, then the name that says that it is complete."""

import errno
import json
import os
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.observations import ObservationError
from dit_policy_training.conversion.jobs import Halt, Job, Progress
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.manifest import Refusal, ShardRecord, ShardsFolder, files_of
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.recording import BagMessage, Recording, fingerprint
from dit_policy_training.conversion.sampling import EpisodeEnd, Row, Sampler
from dit_policy_training.conversion.settings import Settings
from dit_policy_training.conversion.shards import ShardWriter

TELL_EVERY = 0.25  # s
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

Tell = Callable[[Progress], None]


class BagChangedError(ValueError):
    """The bag's files are not what they were when the conversion began."""


def convert_bag(job: Job, tell: Tell) -> ShardRecord | Refusal | Halt:
    """The bag's shard, made or found; or why there is none. `tell` hears how far it is a few times a second.

    A shard that another bag of the same bytes made is returned as it is, under this bag's name.
    """
    try:
        return _shard_of(job, tell)
    except Exception as error:
        if reason := _no_room(error):
            return Halt(f"{job.shards}: {reason}; make room, then run the same command to go on")
        if isinstance(error, (ValueError, OSError, ObservationError)):
            return Refusal(job.given, _in_words(error), traceback.format_exc())
        reason = f"a fault of the converter, please report it: {type(error).__name__}: {error}"
        return Refusal(job.given, reason, traceback.format_exc())


def sampled(bag: Path, config: ConvertConfig, embodiment: Embodiment) -> Iterator[Row | EpisodeEnd]:
    """A bag's rows once more, for the verifier. `embodiment` with the dataset's fps."""
    with Recording(bag, config.recover) as recording:
        yield from Sampler(recording, config, embodiment).events()


def _shard_of(job: Job, tell: Tell) -> ShardRecord:
    files = files_of(job.bag)
    hashed = fingerprint(job.bag)
    settings = Settings.of(job.config, job.embodiment)
    folder = ShardsFolder(job.shards)
    key = settings.key(hashed)
    if (found := folder.find(key)) is not None:
        return replace(found, bag=str(job.given), files=files)
    partial = folder.new_folder(job.part)
    try:
        record = _converted(job, partial, tell)
        if files_of(job.bag) != files:
            raise BagChangedError("its files changed while they were read; convert again when it is complete")
        record = replace(record, key=key, fingerprint=hashed, files=files, settings=settings)
        return folder.keep(record)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _converted(job: Job, partial: Path, tell: Tell) -> ShardRecord:
    layout = Layout.of(job.config, job.embodiment)
    with Recording(job.bag, job.config.recover) as recording:
        read = _Watched(recording)
        sampler = Sampler(read, job.config, job.embodiment)
        with ShardWriter(partial, layout, job.config.video, job.threads) as writer:
            told = time.monotonic()
            for event in sampler.events():
                if isinstance(event, EpisodeEnd):
                    writer.end(event.reason is None)
                else:
                    writer.add(event)
                if time.monotonic() - told > TELL_EVERY:
                    told = time.monotonic()
                    tell(Progress(job.number, read.share, writer.frames))
    account = sampler.account
    if not writer.episodes:
        raise ValueError(_nothing_left(account.as_json()))
    return ShardRecord(
        folder=partial,
        key="",
        bag=str(job.given),
        files=(),
        fingerprint="",
        settings=Settings.of(job.config, job.embodiment),
        frames=writer.frames,
        episodes=writer.episodes,
        account=json.loads(json.dumps(account.as_json())),  # as it will be read back
    )


class _Watched:
    """A Recording, and how far it has been read."""

    def __init__(self, recording: Recording):
        self._recording = recording
        self.share = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._recording, name)

    def messages(self, topics: Sequence[str]) -> Iterator[BagMessage]:
        """As Recording.messages."""
        wanted = {topic.lstrip("/") for topic in topics}
        counts = [info.count for name, info in self._recording.topics.items() if name.lstrip("/") in wanted]
        total = max(sum(counts), 1)
        for number, message in enumerate(self._recording.messages(topics)):
            self.share = min(number / total, 1.0)
            yield message


def _nothing_left(account: dict[str, Any]) -> str:
    reasons = Counter(episode["left_out"] for episode in account["episodes"])
    said = "; ".join(f"{count} times: {reason}" for reason, count in reasons.most_common())
    return f"none of its {len(account['episodes'])} episodes was kept: {said or 'it has none'}"


def _in_words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _no_room(error: BaseException) -> str:
    """The reason, if the error comes of a disk that takes no more, by number or in a library's words; or nothing."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return os.strerror(seen.errno)
        if "No space left on device" in str(seen):
            return "No space left on device"
        seen = seen.__cause__ or seen.__context__
    return ""
