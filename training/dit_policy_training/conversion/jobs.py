"""What the process that runs a conversion and its workers tell each other."""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.conversion.manifest import Refusal, ShardRecord
from dit_policy_training.conversion.options import ConvertConfig


@dataclass(frozen=True)
class Job:
    """A bag to be made a shard."""

    number: int  # of the bag, among the run's
    bag: Path  # absolute
    given: Path  # the same in the words of the user
    size: int  # bytes
    config: ConvertConfig
    embodiment: Embodiment  # with the dataset's fps
    shards: Path  # the folder
    part: str  # of the work, see ShardsFolder.new_folder
    threads: int  # cores to use


@dataclass(frozen=True)
class Begun:
    """A worker took the job up."""

    number: int


@dataclass(frozen=True)
class Progress:
    """How far a job is: the share of the bag's messages read, 0 to 1, and the frames written so far."""

    number: int
    share: float
    frames: int


@dataclass(frozen=True)
class Halt:
    """What makes going on pointless for any bag, such as a full disk."""

    reason: str


@dataclass(frozen=True)
class Done:
    """A job's end."""

    number: int
    outcome: ShardRecord | Refusal | Halt


Event = Begun | Progress | Done


class Executor(Protocol):
    """A way to have jobs done."""

    def __call__(self, jobs: list[Job], workers: int) -> Generator[Event, None, None]:
        """Do the jobs in the given order, `workers` at a time; one Done each. Closing it stops the workers."""
