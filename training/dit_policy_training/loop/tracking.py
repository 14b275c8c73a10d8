"""Where a run's figures and pictures go: metrics.jsonl and TensorBoard always, Weights & Biases where it is asked for.

One process of a run has a Tracker: the main one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2

from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.loop.wandb_run import WandbRun, start_wandb

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class Tracker:
    """The rows of a run: step, loss, lr, grad_norm, steps_per_s, samples_per_s, data_share, seconds, validation_*."""

    def __init__(
        self,
        config: TrainConfig,
        output_dir: Path,
        rows: Sequence[Mapping[str, float]] = (),
        say: Callable[[str], None] = print,
    ):
        """`rows` are those of the run that goes on, up to the step it goes on from; later ones are forgotten.

        `say` is told, in a line, where else the run can be seen. Raises OSError where output_dir cannot be written.
        """
        # Half a second; only a run needs it.
        from torch.utils.tensorboard import SummaryWriter

        self.rows: list[dict[str, float]] = [dict(row) for row in rows]
        path = output_dir / METRICS
        unfinished = path.with_name(f".{METRICS}")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        unfinished.replace(path)
        self._file = path.open("a", encoding="utf-8")
        # What an earlier run wrote beyond the step that this one goes on from would be shown beside it.
        next_step = int(self.rows[-1]["step"]) + 1 if self.rows else 0
        self._tensorboard = SummaryWriter(output_dir / TENSORBOARD, purge_step=next_step)
        self._wandb: WandbRun | None = start_wandb(config, output_dir, continues=bool(self.rows), say=say)

    def log(self, row: Mapping[str, float]) -> None:
        """Keep a row, on disk at once. Raises OSError, and a row that is not written whole is not kept."""
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()
        self.rows.append(dict(row))
        step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self._tensorboard.add_scalar(tag(name), value, step)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({tag(name): value for name, value in row.items() if name != "step"}, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG under a name, such as "samples"."""
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        if picture is None:
            raise OSError(f"{path} cannot be read as a picture")
        self._tensorboard.add_image(name, picture, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.picture(name, path, step)

    def close(self) -> None:
        """Write what is not yet written."""
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()


def tag(name: str) -> str:
    """What a column of metrics.jsonl is called in TensorBoard, which groups by the part before the slash.

    loss -> train/loss, validation_loss -> validation/loss, steps_per_s -> speed/steps_per_s.
    """
    if name.startswith("validation_"):
        return f"validation/{name.removeprefix('validation_')}"
    if name.endswith("_per_s") or name in ("data_share", "seconds"):
        return f"speed/{name}"
    return f"train/{name}"
