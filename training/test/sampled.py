"""What the sampler makes of made-up recordings, by way of a real bag."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import toy_robot
from dit_policy_training.conversion.account import BagAccount
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.recording import Recording
from dit_policy_training.conversion.sampling import EpisodeEnd, Row, Sampler
from toy_robot import START_NS, Recorded

from dit_policy_ros.embodiment import Embodiment


@dataclass
class Sampled:
    """The rows of each episode, the reasons for which episodes were left out, and the account."""

    account: BagAccount
    episodes: list[list[Row]] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for episode in self.episodes for row in episode]


def sample_bag(bag: Path, embodiment: Embodiment, **options: Any) -> Sampled:
    """The events of a bag; `options` are ConvertConfig's. Every row must belong to an episode that is ended."""
    config = ConvertConfig(str(bag), Path("unused"), Path("unused"), **options)
    with Recording(bag) as recording:
        sampler = Sampler(recording, config, embodiment)
        sampled = Sampled(sampler.account)
        rows: list[Row] = []
        for event in sampler.events():
            if isinstance(event, EpisodeEnd):
                sampled.episodes.append(rows)
                sampled.reasons.append(event.reason)
                rows = []
            else:
                rows.append(event)
    assert rows == []
    return sampled


def sample(
    folder: Path, recorded: Iterable[Recorded], embodiment: Embodiment, store: Any = toy_robot.STORE, **options: Any
) -> Sampled:
    """Record the messages as a bag in `folder`, and sample it."""
    number = sum(1 for _ in folder.iterdir())
    ordered = sorted(recorded, key=lambda message: message.receive_ns)
    bag = toy_robot.write_bag(folder / f"bag_{number}", ordered, store=store)
    return sample_bag(bag, embodiment, **options)


def seconds(ns: int) -> float:
    """Since the recording's start."""
    return (ns - START_NS) / 1e9
