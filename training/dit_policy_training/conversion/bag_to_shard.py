"""One bag to one shard, in a worker: recording -> sampler -> writer, then the name that says that it is complete."""

import json
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.observations import ObservationError
from dit_policy_training.conversion.disk import no_room
from dit_policy_training.conversion.jobs import Halt, Job, Progress
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.manifest import Refusal, ShardRecord, ShardsFolder, files_of
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.recording import BagMessage, Recording, fingerprint
from dit_policy_training.conversion.sampling import EpisodeEnd, Row, Sampler
from dit_policy_training.conversion.settings import Settings
from dit_policy_training.conversion.shards import ShardWriter

TELL_EVERY = 0.25  # s

Tell = Callable[[Progress], None]


class BagChangedError(ValueError):
    """The bag's files are not what they were when the conversion began."""


class NothingKeptError(ValueError):
    """A bag of which no episode is left; the message says why."""


def convert_bag(job: Job, tell: Tell) -> ShardRecord | Refusal | Halt:
    """The bag's shard, made or found; or why there is none. `tell` hears how far it is a few times a second.

    A shard that another bag of the same bytes made is returned under this bag's name.
    """
    conversion = _Conversion(job, tell)
    try:
        return conversion.shard()
    except Exception as error:
        if reason := no_room(error):
            return Halt(f"{job.shards}: {reason}; make room, then run the same command to go on")
        words = str(error)
        if not words or not isinstance(error, (ValueError, OSError, ObservationError)):
            words = f"a fault of the converter, please report it: {type(error).__name__}: {error}"
        return Refusal(job.given, words, traceback.format_exc(), conversion.account())


def sampled(bag: Path, config: ConvertConfig, embodiment: Embodiment) -> Iterator[Row | EpisodeEnd]:
    """A bag's rows once more, for the verifier. `embodiment` with the dataset's fps."""
    with Recording(bag, config.recover) as recording:
        yield from Sampler(recording, config, embodiment).events()


class _Conversion:
    def __init__(self, job: Job, tell: Tell):
        self._job, self._tell = job, tell
        self._sampler: Sampler | None = None
        self._notes: list[str] = []

    def shard(self) -> ShardRecord:
        job = self._job
        files = files_of(job.bag)
        hashed = fingerprint(job.bag)
        settings = Settings.of(job.config, job.embodiment)
        shards = ShardsFolder(job.shards)
        key = settings.key(hashed)
        if (found := shards.find(key)) is not None:
            return replace(found, bag=str(job.given), files=files)
        partial = shards.new_folder(job.part)
        try:
            frames, episodes = self._write(partial)
            if files_of(job.bag) != files:
                raise BagChangedError("its files changed while they were read; convert again when it is complete")
            account = self.account() or {}
            record = ShardRecord(partial, key, str(job.given), files, hashed, settings, frames, episodes, account)
            return shards.keep(record)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _write(self, partial: Path) -> tuple[int, int]:
        """Frames and episodes of the shard written. Raises NothingKeptError if there are none."""
        job = self._job
        layout = Layout.of(job.config, job.embodiment)
        with Recording(job.bag, job.config.recover) as recording:
            read = _Watched(recording)
            self._sampler = Sampler(cast(Recording, read), job.config, job.embodiment)
            with ShardWriter(partial, layout, job.config.video, job.threads) as writer:
                self._notes = list(writer.notes)
                self._pass_on(self._sampler, writer, read)
        if not writer.episodes:
            raise NothingKeptError(_nothing_kept(self._sampler.account.as_json()))
        return writer.frames, writer.episodes

    def _pass_on(self, sampler: Sampler, writer: ShardWriter, read: "_Watched") -> None:
        rows, told = 0, time.monotonic()
        for event in sampler.events():
            if isinstance(event, EpisodeEnd):
                writer.end(event.reason is None)
                continue
            writer.add(event)
            rows += 1
            if time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                self._tell(Progress(self._job.number, read.share, rows))

    def account(self) -> dict[str, Any] | None:
        """What the sampler saw so far, as it will be read back."""
        if self._sampler is None:
            return None
        account = self._sampler.account.as_json()
        account["notes"] = [*account["notes"], *self._notes]
        return cast(dict[str, Any], json.loads(json.dumps(account)))


class _Watched:
    """A Recording, and how far it has been read."""

    def __init__(self, recording: Recording):
        self._recording = recording
        self.share = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recording, name)

    def messages(self, topics: Sequence[str]) -> Iterator[BagMessage]:
        """As Recording.messages."""
        wanted = {topic.lstrip("/") for topic in topics}
        counts = [info.count for name, info in self._recording.topics.items() if name.lstrip("/") in wanted]
        total = max(sum(counts), 1)
        for number, message in enumerate(self._recording.messages(topics)):
            self.share = min(number / total, 1.0)
            yield message


def _nothing_kept(account: dict[str, Any]) -> str:
    reasons = Counter(episode["left_out"] for episode in account["episodes"])
    said = "; ".join(f"{count} times: {reason}" for reason, count in reasons.most_common())
    return f"none of its {len(account['episodes'])} episodes was kept: {said or 'it has none'}"
