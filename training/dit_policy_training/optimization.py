"""What moves the weights: optimizer, learning-rate schedule, and the average of the weights that is kept."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dit_policy_ros.policy.modeling import MultitaskDiTPolicy


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) or Adam. The vision encoders learn at lr times their `lr_multiplier`."""

    type: Literal["adamw", "adam"] = "adamw"
    lr: float = 3e-4  # the highest of the schedule
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the mean and of the square of the gradient
    weight_decay: float = 1e-4
    grad_clip: float = 1.0  # largest norm of the gradient; 0 leaves it free


@dataclass
class SchedulerConfig:
    """Linear warm-up from 0, then constant or down to 0 along half a cosine (arXiv 1608.03983)."""

    type: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup_steps: int = 200  # over which the rate rises


def make_optimizer(config: OptimizerConfig, policy: MultitaskDiTPolicy) -> Optimizer:
    """The optimizer over the policy's trainable weights."""
    kind = AdamW if config.type == "adamw" else Adam
    return kind(policy.parameter_groups(config.lr), betas=config.betas, weight_decay=config.weight_decay)


def make_scheduler(config: SchedulerConfig, optimizer: Optimizer, train_steps: int) -> LambdaLR:
    """The schedule of the learning rates; to be stepped once after each optimizer step."""
    return LambdaLR(optimizer, lambda step: lr_factor(config, step, train_steps))


def lr_factor(config: SchedulerConfig, step: int, train_steps: int) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    warmup = min(config.warmup_steps, train_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.type == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(train_steps - warmup, 1)))


class Ema:
    """An exponential moving average of a model's trainable weights.

    It starts short, decay (1 + n) / (10 + n) after n updates until that reaches `decay`, so that the first
    weights, which know nothing, are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._updates = 0
        self._live = [weight for weight in model.parameters() if weight.requires_grad]
        self._average = [weight.detach().clone() for weight in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        get_ema_multi_avg_fn(decay)(self._average, self._live, self._updates)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, its own afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, average in zip(self._live, self._average, strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
