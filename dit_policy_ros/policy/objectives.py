"""What the transformer is trained to predict: the noise schedules, the noisy actions, the targets and the loss.

Both objectives offer the same: `draw_timesteps`, `corrupt` (noisy actions and target), what the transformer is
told of a timestep (`embedding_timestep`, `clean_timestep`) and, for sampling, their tables. Actions here are
normalised, (B, horizon, A).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from .draws import Draws
from .objective_configuration import DiffusionConfig, FlowMatchingConfig, ObjectiveConfig
from .recent import Recent

PLANS = 16
"""How many plans an objective keeps: a policy is sampled in few ways. A plan is a few kB."""


def cosine_alphas_cumprod(num_train_timesteps: int) -> Tensor:
    """The share of signal left at each timestep, (num_train_timesteps,), of the squared-cosine schedule.

    Nichol and Dhariwal, arXiv 2102.09672, eq. 17, with each beta capped at 0.999; diffusers'
    `squaredcos_cap_v2`.
    """

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - signal((i + 1) / num_train_timesteps) / signal(i / num_train_timesteps), 0.999)
        for i in range(num_train_timesteps)
    ]
    # On the CPU whatever the default device is, so that the last bit does not depend on it.
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32, device="cpu"), dim=0)


@dataclass(frozen=True)
class LossTerms:
    """A loss before its division: parts of a batch are added up, then divided once."""

    total: Tensor
    """The sum of the squared errors that count, a scalar."""
    count: Tensor
    """How many they are, int64."""

    @property
    def mean(self) -> Tensor:
        """The loss; zero where nothing counts."""
        return self.total / self.count.clamp_min(1)


def squared_error(prediction: Tensor, target: Tensor, is_pad: Tensor | None) -> LossTerms:
    """The squared error over the elements of the steps that are not padding.

    prediction, target (B, T, A); is_pad (B, T) bool, or None for no mask.
    """
    error = (prediction - target).square()
    if is_pad is None:
        return LossTerms(error.sum(), torch.full((), error.numel(), dtype=torch.int64, device=error.device))
    keep = ~is_pad.unsqueeze(-1)
    return LossTerms((error * keep).sum(), keep.sum() * error.shape[-1])


class Objective(nn.Module):
    """What is common to the objectives: the sampling plans made of their tables (sampling.make_plan)."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: Recent[Any] = Recent(PLANS)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moved or cast, the tables are others, and so are plans made of them."""
        self.plans.clear()
        return super()._apply(fn, recurse)


class Diffusion(Objective):
    """DDPM: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (arXiv 2006.11239, eq. 4).

    The target is the noise, x_0, or v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0 (arXiv 2202.00512,
    appendix D).
    """

    alphas_cumprod: Tensor

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        self.reset_buffers("cpu")

    def reset_buffers(self, device: torch.device | str) -> None:
        """Makes the table that is not in the state_dict anew, on a device."""
        table = cosine_alphas_cumprod(self.config.num_train_timesteps)
        self.register_buffer("alphas_cumprod", table.to(device), persistent=False)
        self.plans.clear()

    @property
    def clean_timestep(self) -> float:
        """What the transformer is told of a step that is given clean: the one before 0, where alpha_bar is 1."""
        return -1.0

    def embedding_timestep(self, timestep: Tensor) -> Tensor:
        """What the transformer's embedding is given for timesteps of any shape, float32."""
        return timestep.float()

    def draw_timesteps(self, count: int, device: torch.device, draws: Draws | None = None) -> Tensor:
        """Training timesteps, (count,) int64, uniform over the schedule."""
        return (draws or Draws()).integers(0, self.config.num_train_timesteps, (count,), device)

    def corrupt(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy actions and what to predict from them, both as clean (B, T, A); timestep (B,)."""
        alpha_bar = self.alphas_cumprod[timestep].view(-1, 1, 1)
        signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        targets = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - spread * clean}
        return signal * clean + spread * noise, targets[self.config.prediction_type]


class FlowMatching(Objective):
    """Straight lines from noise (t=0) to data (t=1); the target is their velocity (arXiv 2210.02747, eq. 20 to 23)."""

    def __init__(self, config: FlowMatchingConfig):
        super().__init__()
        self.config = config

    @property
    def clean_timestep(self) -> float:
        """What the transformer is told of a step that is given clean: that it is data, t = 1."""
        return self.config.timestep_scale

    def embedding_timestep(self, timestep: Tensor) -> Tensor:
        """What the transformer's embedding is given for timesteps of any shape, float32."""
        return self.config.timestep_scale * timestep

    def draw_timesteps(self, count: int, device: torch.device, draws: Draws | None = None) -> Tensor:
        """Training times in [0, 1], (count,) float32."""
        draws, config = draws or Draws(), self.config
        if config.timestep_sampling == "uniform":
            return draws.uniform((count,), device)
        return config.beta_scale * (1 - draws.beta(config.beta_alpha, config.beta_beta, (count,), device))

    def corrupt(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy actions and what to predict from them, both as clean (B, T, A); timestep (B,)."""
        keep = 1 - self.config.sigma_min
        t = timestep.view(-1, 1, 1)
        return t * clean + (1 - keep * t) * noise, clean - keep * noise


def make_objective(config: ObjectiveConfig) -> Diffusion | FlowMatching:
    """The objective a configuration describes."""
    if isinstance(config, DiffusionConfig):
        return Diffusion(config)
    if isinstance(config, FlowMatchingConfig):
        return FlowMatching(config)
    raise TypeError(f"no objective for {type(config).__name__}; registered: diffusion, flow_matching")
