"""What can be chosen of a training run; `--help` prints these comments, docs/train.md explains them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import draccus
import torch
from draccus.parsers.decoding import decode_literal

from dit_policy_ros.policy.configuration import PolicyConfig
from dit_policy_training.data.sources import DatasetSource

# Named, since draccus finds no comment behind an annotation with quotes in it.
OptimizerType = Literal["adamw", "adam"]
SchedulerType = Literal["cosine", "constant"]
HalfPrecision = Literal["bfloat16", "float16"]
CacheKind = Literal["auto", "memory", "disk", "off"]


def _cache_kind(value: Any, path: Sequence[str]) -> Any:
    return decode_literal(CacheKind, "off" if value is False else value, path)  # YAML reads `off` as false


draccus.decode.register(CacheKind, _cache_kind)


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) or Adam. The vision encoders learn at lr times their `lr_multiplier`."""

    type: OptimizerType = "adamw"  # adam adds weight_decay to the gradient, adamw takes it off the weights
    lr: float = 3e-4  # the highest of the schedule
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the mean and of the square of the gradient
    eps: float = 1e-8  # added to the denominator
    weight_decay: float = 1e-4  # a step's pull of the weights towards 0, relative to lr
    grad_clip: float = 1.0  # largest norm of the gradient; 0 leaves it free


@dataclass
class SchedulerConfig:
    """Linear warm-up from 0, then constant or down to 0 along half a cosine (arXiv 1608.03983)."""

    type: SchedulerType = "cosine"  # after the warm-up
    warmup_steps: int = 200  # over which the rate rises


@dataclass
class ValidationConfig:
    """Episodes that are not trained on, and how often the policy is measured on them."""

    episode_share: float = 0.05  # of the episodes, and of a task with five or more at least one; none if fewer than 10
    freq: int = 1000  # steps from one measurement to the next
    samples: int = 256  # moments that the loss and the action error are measured on, the same each time


@dataclass
class TrackingConfig:
    """TensorBoard is always written; Weights & Biases where WANDB_API_KEY (or WANDB_MODE=offline) is set."""

    wandb_project: str = "dit_policy"  # the project there
    run_name: str = ""  # of the run there; empty: the output folder's name
    pictures: bool = True  # sample frames after augmentation, curves, predicted over recorded actions


@dataclass
class TrainConfig:
    """A training run. Of `policy`, the features, the tasks and action_state_indices are filled in from the dataset."""

    output_dir: Path  # new, or see overwrite and checkpoint_path
    dataset_path: Path | None = None  # folder of a LeRobotDataset v3
    dataset_repo_id: str = ""  # instead: a dataset of the Hugging Face hub, downloaded once
    dataset_revision: str = ""  # of the hub's dataset: branch, tag or commit; empty: the newest of this format
    datasets: list[DatasetSource] = field(default_factory=list)  # instead: several, with weights
    embodiment: Path | None = None  # the robot's YAML, for a dataset that brings none; the node needs one
    overwrite: bool = False  # train into an output_dir that holds checkpoints already
    checkpoint_path: Path | None = None  # go on with this run, exactly
    finetune: bool = False  # start anew from checkpoint_path's weights instead; statistics are those of the dataset
    task_weights: dict[str, float] = field(default_factory=dict)  # by instruction; 2: twice as often, 0: never; else 1
    balance_tasks: bool = False  # each instruction as often as any other, however many frames it has
    idle_weight: float = 1.0  # of idle frames; 0.1: a tenth as often
    idle_motion: float = 0.01  # idle: for n_action_steps no action moves more than this share of its range
    drop_n_last_frames: int = 0  # of every episode, whose windows are mostly padding
    batch_size: int = 64  # samples a step, process and accumulation step
    gradient_accumulation_steps: int = 1  # batches whose gradients make one step
    train_steps: int = 30000  # optimizer steps
    num_workers: int = 2  # processes that decode pictures
    cache: CacheKind = "auto"  # of decoded pictures; auto: memory, else disk, else off
    cache_limit_gb: float = 4.0  # that auto may use of memory
    cache_disk_limit_gb: float = 100.0  # that auto may use of the disk
    cache_dir: Path | None = None  # of the disk's cache; empty: beside the dataset
    num_threads: int = 0  # of torch on the CPU; 0 leaves the choice to torch
    save_freq: int = 5000  # steps from checkpoint to checkpoint
    keep_checkpoints: int = 2  # older ones that are kept beside the best and the last; -1: all
    log_freq: int = 20  # steps that a row of metrics.jsonl is the mean of
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1, ...; accelerate launch chooses
    use_amp: bool = False  # matrix products in amp_dtype
    amp_dtype: HalfPrecision = "bfloat16"  # float16 only for GPUs without bfloat16; it scales the loss
    compile: bool = False  # torch.compile: a minute at the start, then faster steps on a GPU
    seed: int = 0  # of the weights, the order of samples, the noise and the augmentation
    ema_decay: float = 0.999  # of the average of the weights, which is what is saved; 0: the last step's
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def validate(self) -> None:
        """Raises ValueError naming every setting that is out of range or contradicts another; touches no file."""
        if problems := list(self._problems()):
            raise ValueError("settings that cannot be:\n  - " + "\n  - ".join(problems))

    def _problems(self) -> Iterator[str]:
        counts = {
            name: getattr(self, name)
            for name in ("batch_size", "gradient_accumulation_steps", "train_steps", "save_freq", "log_freq")
        }
        counts |= {"validation.freq": self.validation.freq, "validation.samples": self.validation.samples}
        for name, value in counts.items():
            if value < 1:
                yield f"{name} must be at least 1, got {value}"
        not_negative = {name: getattr(self, name) for name in ("num_workers", "num_threads", "seed")}
        not_negative |= {name: getattr(self, name) for name in ("drop_n_last_frames", "idle_weight", "idle_motion")}
        not_negative |= {"scheduler.warmup_steps": self.scheduler.warmup_steps}
        not_negative |= {
            f"optimizer.{name}": getattr(self.optimizer, name) for name in ("eps", "weight_decay", "grad_clip")
        }
        for name, amount in not_negative.items():
            if amount < 0:
                yield f"{name} must be at least 0, got {amount}"
        if self.keep_checkpoints < -1:
            yield f"keep_checkpoints must be at least -1 (all), got {self.keep_checkpoints}"
        shares = {f"optimizer.betas[{index}]": beta for index, beta in enumerate(self.optimizer.betas)}
        shares |= {"ema_decay": self.ema_decay, "validation.episode_share": self.validation.episode_share}
        for name, share in shares.items():
            if not 0 <= share < 1:
                yield f"{name} must be in [0, 1), got {share}"
        if not self.optimizer.lr > 0:
            yield f"optimizer.lr must be positive, got {self.optimizer.lr}"
        if self.use_amp and self.amp_dtype == "float16" and self.device.startswith("cpu"):
            yield "amp_dtype float16 is for GPUs; a CPU has bfloat16: --amp_dtype=bfloat16, or --use_amp=false"
        if self.finetune and self.checkpoint_path is None:
            yield "finetune starts from the weights of a checkpoint: give --checkpoint_path=FOLDER"
        given = [bool(self.dataset_path), bool(self.dataset_repo_id), bool(self.datasets)]
        if sum(given) != 1:
            yield "give one of dataset_path (a folder), dataset_repo_id (on the hub) and datasets (several)" + (
                "; more than one is given" if sum(given) else ""
            )
