"""`python -m dit_policy_training.train`: a LeRobotDataset v3 to a policy's checkpoint folder.

Writes to output_dir: `checkpoints/<step>/` and the link `checkpoints/last`, `metrics.jsonl`, `loss.png` and
`config.yaml`, which repeats the run. The weights saved are the moving average (EMA), which acts better than
the last step's; `ema_decay: 0` saves the last step's. Ctrl-C or SIGTERM ends the run after the step in
progress: it is saved, and the exit status is 0.
"""

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dit_policy_ros.policy.checkpoint import load_checkpoint, save_checkpoint
from dit_policy_ros.policy.configuration import PolicyConfig
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.preprocessing import Preprocessor
from dit_policy_training import cli
from dit_policy_training.data.frames import batches, open_frames
from dit_policy_training.data.order import SampleOrder
from dit_policy_training.data.statistics import stats
from dit_policy_training.data.table import load_table
from dit_policy_training.data.windows import Windows
from dit_policy_training.optimization import (
    Ema,
    OptimizerConfig,
    SchedulerConfig,
    make_optimizer,
    make_scheduler,
)
from dit_policy_training.reporting import Metrics, figures, model_card, plot_loss, training_progress


@dataclass
class TrainConfig:
    """A training run. Of `policy`, the features, the tasks and action_state_indices are filled in from the dataset."""

    dataset_path: Path  # folder of a LeRobotDataset v3 with its embodiment.yaml
    output_dir: Path  # new, or see overwrite
    overwrite: bool = False  # train into an output_dir that holds checkpoints already
    batch_size: int = 64  # observations a step
    train_steps: int = 30000  # optimizer steps
    num_workers: int = 2  # processes that decode pictures, if they do not fit into cache_limit_gb
    cache_limit_gb: float = 4.0  # memory for decoded pictures
    num_threads: int = 0  # of torch on the CPU; 0 leaves the choice to torch
    save_freq: int = 5000  # steps from checkpoint to checkpoint
    log_freq: int = 20  # steps that a row of metrics.jsonl is the mean of
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1, ...
    use_amp: bool = False  # matrix products in bfloat16
    seed: int = 0  # of the weights, the order of samples and the noise
    checkpoint_path: Path | None = None  # weights to start from; the statistics stay this dataset's
    ema_decay: float = 0.999  # of the average of the weights, which is what is saved; 0: the last step's
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def validate(self) -> None:
        """Raises ValueError naming every setting that is out of range."""
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("batch_size", "train_steps", "save_freq", "log_freq")
            if getattr(self, name) < 1
        ]
        if not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.optimizer.lr <= 0:
            problems.append(f"optimizer.lr must be positive, got {self.optimizer.lr}")
        if (self.output_dir / "checkpoints").exists() and not self.overwrite:
            problems.append(f"{self.output_dir} holds a run; choose another output_dir or give --overwrite=true")
        if problems:
            raise ValueError("settings that cannot be:\n  - " + "\n  - ".join(problems))


class Trainer:
    """A run: `train` does the steps; whatever ends it, the checkpoint is written."""

    def __init__(self, config: TrainConfig, console: Console | None = None):
        config.validate()
        self._config = config
        self._console = console or Console()
        transformers.utils.logging.disable_progress_bar()  # it would write over ours
        torch.manual_seed(config.seed)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._table = load_table(config.dataset_path)
        self._windows = Windows(self._table, config.policy.n_obs_steps, config.policy.horizon)
        self.policy = _make_policy(config, self._windows).to(config.device).train()
        self._optimizer = make_optimizer(config.optimizer, self.policy)
        self._scheduler = make_scheduler(config.scheduler, self._optimizer, config.train_steps)
        self._ema = Ema(self.policy, config.ema_decay)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        (config.output_dir / "config.yaml").write_text(self._settings())
        self._metrics = Metrics(config.output_dir / "metrics.jsonl")
        self._step = 0
        self._stop = False

    def train(self) -> Path:
        """Run to train_steps, or to a signal; returns the folder of the last checkpoint."""
        config = self._config
        with training_progress(self._console) as progress, self._stopping_on_signals():
            batches = self._batches(progress)
            bar = progress.add_task("training", total=config.train_steps, note="")
            self._started = time.perf_counter()
            pending: list[tuple[Tensor, Tensor]] = []  # not read off the device before they are logged
            logged = self._started
            while self._step < config.train_steps and not self._stop:
                pending.append(self._train_step(next(batches)))
                progress.update(bar, advance=1)
                if self._step % config.log_freq == 0 or self._step == config.train_steps:
                    progress.update(bar, note=figures(self._log(pending, time.perf_counter() - logged)))
                    pending, logged = [], time.perf_counter()
                if self._step % config.save_freq == 0 and self._step < config.train_steps:
                    self._save()
            if self._stop:
                progress.console.print(f"stopped at step {self._step} of {config.train_steps}; saving")
            folder = self._save()
        self._metrics.close()
        self._console.print(f"{folder}: {self._step} steps in {self._minutes():.1f} minutes", highlight=False)
        return folder

    def _train_step(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        device = self.policy.device
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        amp = torch.autocast(device.type, torch.bfloat16) if self._config.use_amp else nullcontext()
        with amp:
            loss = self.policy.loss(batch)
        self._optimizer.zero_grad()
        loss.backward()
        largest = self._config.optimizer.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), largest)
        self._optimizer.step()
        self._scheduler.step()
        self._ema.update()
        self._step += 1
        return loss.detach(), norm.detach()

    def _log(self, pending: list[tuple[Tensor, Tensor]], seconds: float) -> dict[str, float]:
        loss, norm = torch.tensor(pending).mean(0).tolist()
        if not np.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self._step}: lower optimizer.lr or optimizer.grad_clip; the last sound "
                f"checkpoint, if any, is {self._config.output_dir / 'checkpoints' / 'last'}"
            )
        row = {
            "step": self._step,
            "loss": loss,
            "lr": self._scheduler.get_last_lr()[0],
            "grad_norm": norm,
            "steps_per_s": len(pending) / seconds,
            "samples_per_s": len(pending) * self._config.batch_size / seconds,
            "seconds": time.perf_counter() - self._started,
        }
        self._metrics.add(row)
        return row

    def _save(self) -> Path:
        checkpoints = self._config.output_dir / "checkpoints"
        folder = checkpoints / f"{self._step:06d}"
        rows = self._metrics.rows
        results = {
            "steps": f"{self._step} of {self._config.train_steps}",
            "duration": f"{self._minutes():.1f} minutes on {self.policy.device}",
            "loss": f"{np.mean([row['loss'] for row in rows[-5:]]):.4f}" if rows else "not logged yet",
            "torch": torch.__version__,
        }
        card = model_card(self._table, self._settings(), results)
        with self._ema.applied() if self._config.ema_decay else nullcontext():
            assert self._table.embodiment is not None
            save_checkpoint(folder, self.policy, self._table.embodiment.to_yaml(), card)
        link = checkpoints / ".last"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(checkpoints / "last")
        plot_loss(rows, self._config.output_dir / "loss.png")
        return folder

    def _minutes(self) -> float:
        return (time.perf_counter() - self._started) / 60

    def _settings(self) -> str:
        return draccus.dump(self._config)

    def _batches(self, progress: Progress) -> Iterator[dict[str, Any]]:
        config = self._config
        order = SampleOrder(np.arange(len(self._table)), None, config.batch_size, config.seed)
        frames = open_frames(
            self._table,
            cache_limit_gb=config.cache_limit_gb,
            resize=_resizers(self.policy),
            num_workers=config.num_workers,
            progress=progress,
        )
        progress.console.print(frames.description)
        return batches(self._windows, frames, map(order.at, itertools.count()))

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            self._stop = True
            signal.signal(number, signal.default_int_handler)  # a second one ends at once

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _resizers(policy: MultitaskDiTPolicy) -> dict[str, Callable[[Tensor], Tensor]]:
    encoder = policy.observation_encoder
    resizers: dict[str, Callable[[Tensor], Tensor]] = {}
    for key, preprocessor in zip(encoder.cameras, encoder.preprocessors, strict=True):
        assert isinstance(preprocessor, Preprocessor)
        resizers[key] = preprocessor.resize
    return resizers


def _make_policy(config: TrainConfig, windows: Windows) -> MultitaskDiTPolicy:
    table = windows.table
    policy_config = replace(
        config.policy,
        input_features=table.input_features,
        output_features=table.output_features,
        action_state_indices=table.action_state_indices,
        tasks=table.tasks,
    )
    policy_config.validate()
    policy = MultitaskDiTPolicy(policy_config, stats(windows, policy_config.action_mode))
    if config.checkpoint_path is not None:
        _start_from(policy, config.checkpoint_path)
    return policy


def _start_from(policy: MultitaskDiTPolicy, checkpoint: Path) -> None:
    weights = load_checkpoint(checkpoint).state_dict()
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} is of another architecture than --policy describes: {error}") from error


def train(config: TrainConfig) -> int:
    """A whole run; the exit status is 0 also when a signal ended it, since it is saved."""
    Trainer(config).train()
    return 0


def main() -> int:
    """The command line; returns the exit status."""
    return cli.run(train, TrainConfig, "dit_policy_training.train")


if __name__ == "__main__":
    raise SystemExit(main())
