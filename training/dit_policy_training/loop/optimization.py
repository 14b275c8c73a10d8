"""What moves the weights: optimizer, learning-rate schedule, clipping, and the average of the weights that is kept."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_training.loop.options import OptimizerConfig, SchedulerConfig


def make_optimizer(config: OptimizerConfig, policy: MultitaskDiTPolicy) -> Optimizer:
    """The optimizer over the policy's trainable weights: torch's fused one, which keeps no temporary copies."""
    kind = AdamW if config.type == "adamw" else Adam
    return kind(
        policy.parameter_groups(config.lr),
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def lr_factor(config: SchedulerConfig, step: int, train_steps: int) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    warmup = min(config.warmup_steps, train_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.type == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(train_steps - warmup, 1)))


class Rates:
    """The learning rates of an optimizer's groups along the schedule; a function of the step, so it needs no state."""

    def __init__(self, config: SchedulerConfig, optimizer: Optimizer, train_steps: int):
        self._config, self._optimizer, self._train_steps = config, optimizer, train_steps
        self._highest = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Gives the groups their rates at a step, counted from 0; returns the first group's."""
        factor = lr_factor(self._config, step, self._train_steps)
        for group, highest in zip(self._optimizer.param_groups, self._highest, strict=True):
            group["lr"] = highest * factor
        return self._highest[0] * factor


@torch.no_grad()
def scaled_step(optimizer: Optimizer, scale: Tensor, grad_clip: float, scaler: Any | None = None) -> Tensor:
    """An optimizer step whose gradients are multiplied by `scale` and cut to the norm grad_clip (0: not cut).

    Both are one factor, and the fused optimizers apply one by themselves (`grad_scale`, by which they divide), so that
    no pass over the gradients is made for it. scaler: the GradScaler of float16, whose factor is in the gradients; it
    leaves the step out where they overflow. Returns the norm of the gradients before the cut, a scalar tensor; not
    finite where they overflow.
    """
    gradients = [
        weight.grad for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None
    ]
    norm = nn.utils.get_total_norm(gradients) * scale
    if scaler is not None:
        norm = norm / scaler._get_scale_async()  # get_scale() would wait for the device
    if grad_clip:
        scale = scale * (grad_clip / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    optimizer.grad_scale = 1 / scale  # type: ignore[attr-defined]
    if scaler is not None:
        scaler.step(optimizer)  # multiplies grad_scale by its own, and takes it away again
        scaler.update()
        return norm
    optimizer.step()
    del optimizer.grad_scale  # type: ignore[attr-defined]
    return norm


class Ema:
    """An exponential moving average of a model's trainable weights.

    It starts short, decay (1 + n) / (10 + n) after n updates until that reaches `decay`, so that the first
    weights, which know nothing, are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._live = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._average = {name: weight.detach().clone() for name, weight in self._live.items()}
        self.updates = 0
        """How many weights were taken in."""

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(list(self._average.values()), list(self._live.values()), self.updates)

    @contextmanager
    def applied(self) -> Iterator[dict[str, Tensor]]:
        """The model has the averaged weights inside, its own afterwards; gives its own, by name."""
        self._swap()
        try:
            yield self._average
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self._live.items():
            kept = live.clone()
            live.copy_(self._average[name])
            self._average[name].copy_(kept)
