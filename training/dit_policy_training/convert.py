"""`python -m dit_policy_training.convert`: rosbag2 recordings to a LeRobotDataset v3.

Each bag is read once, by a worker process of its own, and becomes a finished part ("shard") of the dataset beside it;
what is finished is not done again. At the end the shards are joined, checked and reported on.
"""

from rich.console import Console

from dit_policy_training import cli
from dit_policy_training.conversion.manifest import Refusal
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.running import run

__all__ = ["ConvertConfig", "convert", "main"]


def convert(config: ConvertConfig, console: Console | None = None) -> list[Refusal]:
    """Convert all bags; returns those that were refused. Raises ValueError if none could be converted (see `run`)."""
    return run(config, console or Console())


def main() -> int:
    """The command line; returns the exit status."""
    return cli.run(lambda config: 1 if convert(config) else 0, ConvertConfig, "dit_policy_training.convert")


if __name__ == "__main__":
    raise SystemExit(main())
