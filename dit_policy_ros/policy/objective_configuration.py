"""The objectives' configurations: what the transformer is trained to predict, and how it is sampled by default."""

from dataclasses import dataclass
from typing import Literal

import draccus

from .contradictions import not_finite, not_positive, unknown_choices


@dataclass
class ObjectiveConfig(draccus.ChoiceRegistry):
    """What is common to the objectives.

    `denoising_steps` is the default at inference and may be changed for each call. `noise_draws` is the
    number of noise samples (and timesteps) an observation is trained on at once: its conditioning, the
    expensive part, is encoded once for all of them.
    """

    denoising_steps: int = 10
    noise_draws: int = 1

    @classmethod
    def default_choice_name(cls) -> str:
        """The type meant where a configuration names none."""
        return "diffusion"

    @property
    def max_denoising_steps(self) -> int:
        """The most steps a sampler may take."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = unknown_choices(self, "objective") + not_finite(self, "objective")
        found += not_positive(self, "objective", "noise_draws")
        if not 1 <= self.denoising_steps <= self.max_denoising_steps:
            found.append(
                f"objective.denoising_steps must be 1 to {self.max_denoising_steps}, got {self.denoising_steps}"
            )
        return found


@ObjectiveConfig.register_subclass("diffusion")
@dataclass
class DiffusionConfig(ObjectiveConfig):
    """DDPM (arXiv 2006.11239) with the squared-cosine schedule (arXiv 2102.09672, `squaredcos_cap_v2`).

    `timestep_spacing` "trailing" starts from the last training timestep; "leading", diffusers' default, never
    visits it (arXiv 2305.08891, table 2). `clip_range` bounds the estimate of the clean actions at each step;
    null leaves it free.
    """

    num_train_timesteps: int = 100
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    sampler: Literal["ddpm", "ddim", "dpm_solver++"] = "ddim"
    timestep_spacing: Literal["trailing", "leading"] = "trailing"
    clip_range: float | None = 1.0

    @property
    def max_denoising_steps(self) -> int:
        """One step for each training timestep."""
        return self.num_train_timesteps

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = super().problems() + not_positive(self, "objective", "num_train_timesteps")
        if self.clip_range is not None and self.clip_range <= 0:
            found.append(f"objective.clip_range must be positive or null, got {self.clip_range}")
        return found


@ObjectiveConfig.register_subclass("flow_matching")
@dataclass
class FlowMatchingConfig(ObjectiveConfig):
    """Conditional flow matching along straight lines (arXiv 2210.02747), t from 0 (noise) to 1 (data).

    Training times are drawn uniformly, or ("beta") as `beta_scale * (1 - Beta(beta_alpha, beta_beta))`, which
    favours noisy times (pi0, arXiv 2410.24164, appendix B). The timestep embedding is given
    `timestep_scale * t`: unscaled, t in [0, 1] moves a sixth of its dimensions (1000 moves them all); 1 is what
    LeRobot's checkpoints need.
    """

    sigma_min: float = 0.0
    sampler: Literal["euler", "heun", "rk4"] = "euler"
    timestep_scale: float = 1.0
    timestep_sampling: Literal["uniform", "beta"] = "beta"
    beta_scale: float = 0.999
    beta_alpha: float = 1.5
    beta_beta: float = 1.0

    @property
    def max_denoising_steps(self) -> int:
        """A bound against typing errors: beyond it, steps are smaller than fp32 resolves in the actions."""
        return 1000

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = super().problems() + not_positive(self, "objective", "beta_alpha", "beta_beta", "timestep_scale")
        if not 0 <= self.sigma_min < 1:
            found.append(f"objective.sigma_min must be in [0, 1), got {self.sigma_min}")
        if not 0 < self.beta_scale <= 1:
            found.append(f"objective.beta_scale must be in (0, 1], got {self.beta_scale}")
        return found
