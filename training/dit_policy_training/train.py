"""`python -m dit_policy_training.train`: LeRobotDatasets v3 to a policy's checkpoint folder.

Writes to output_dir: `checkpoints/<step>/` and the links `checkpoints/last` and `checkpoints/best`, `metrics.jsonl`,
`tensorboard/`, pictures, and `config.yaml`, which repeats the run. The weights of a checkpoint are the moving average
(EMA), which acts better than the last step's; `ema_decay: 0` saves the last step's. Ctrl-C or SIGTERM ends the run
after the step in progress: it is saved, and the exit status is 0.

Several processes: `accelerate launch -m dit_policy_training.train ...` or `torchrun -m dit_policy_training.train ...`.
"""

import sys
import tempfile
from pathlib import Path

from dit_policy_training import cli
from dit_policy_training.loop.arguments import with_checkpoint
from dit_policy_training.loop.failures import memory_explained
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.trainer import Trainer

PROGRAM = "dit_policy_training.train"
EXAMPLES = """\
examples:
  a first run        --config=config/training/small_dataset.yaml --dataset_path=DATASET --output_dir=RUN
  go on with it      --checkpoint_path=RUN/checkpoints/last
  train it longer    --checkpoint_path=RUN/checkpoints/last --train_steps=60000
  start from it      --checkpoint_path=RUN/checkpoints/best --finetune --optimizer.lr=3e-5 --dataset_path=OTHER
                     --output_dir=NEW
docs/train.md explains the choices.
"""


def train(config: TrainConfig) -> int:
    """A whole run; the exit status is 0 also when a signal ended it, since it is saved."""
    with memory_explained(config.device):  # the weights alone may be too many
        trainer = Trainer(config)
    trainer.train()
    return 0


def main() -> int:
    """The command line; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="dit_policy_training.") as folder:
        try:
            arguments = with_checkpoint(sys.argv[1:], Path(folder) / "settings.yaml")
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return cli.run(train, TrainConfig, PROGRAM, EXAMPLES, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
