"""`python -m dit_policy_training.convert`: rosbag2 recordings to a LeRobotDataset v3.

Each bag is read once, by a worker process of its own, and becomes a finished part ("shard") of the dataset beside it;
what is finished is not done again. At the end the shards are joined, checked and reported on.
"""

from rich.console import Console

from dit_policy_training import cli
from dit_policy_training.conversion.manifest import Refusal
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.running import run

EXAMPLES = """examples:
  All bags of a folder; run it again after recording more, and only those are converted:
    python -m dit_policy_training.convert --bags=bags/ --embodiment=my_robot.yaml --output=datasets/my_task
  Bags that have no instruction topic, and a robot that waits at the ends of its episodes:
    ... --episodes.task="push the red block" --episodes.trim_idle=true
  An episode wherever the instruction changes, and every picture checked:
    ... --episodes.by=instruction --verify=full
  On four machines that share the folders, then joined:
    ... --shard=1/4        (2/4, 3/4, 4/4 on the others)
    python -m dit_policy_training.merge --output=datasets/my_task
  Long settings in a file:
    ... --config=my_conversion.yaml
"""

__all__ = ["ConvertConfig", "convert", "main"]


def convert(config: ConvertConfig, console: Console | None = None) -> list[Refusal]:
    """Convert all bags; returns those that were refused. Raises ValueError if none could be converted (see `run`)."""
    return run(config, console or Console())


def main() -> int:
    """The command line; returns the exit status."""
    name = "dit_policy_training.convert"
    return cli.run(lambda config: 1 if convert(config) else 0, ConvertConfig, name, EXAMPLES)


if __name__ == "__main__":
    raise SystemExit(main())
