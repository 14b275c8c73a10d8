"""The objectives' configurations: what the transformer is trained to predict, and how it is sampled by default."""

from dataclasses import dataclass
from typing import Literal

import draccus

from .contradictions import not_finite, not_positive, unknown_choices

# Named, because --help loses the comment of a field whose annotation has quotes in it.
PredictionType = Literal["epsilon", "sample", "v_prediction"]
DiffusionSampler = Literal["ddpm", "ddim", "dpm_solver++"]
TimestepSpacing = Literal["trailing", "leading"]
FlowSampler = Literal["euler", "heun", "rk4"]
TimestepSampling = Literal["uniform", "beta"]


@dataclass
class ObjectiveConfig(draccus.ChoiceRegistry):
    """What is common to the objectives.

    `denoising_steps` is the default at inference and may be changed for each call. `noise_draws` is the
    number of noise samples (and timesteps) an observation is trained on at once: its conditioning, the
    expensive part, is encoded once for all of them.
    """

    denoising_steps: int = 10  # of the sampler when it runs; each call may choose another number
    noise_draws: int = 1  # noise samples that an observation is trained on at once: it is encoded once for them

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

    num_train_timesteps: int = 100  # of the noise schedule
    prediction_type: PredictionType = "epsilon"  # what is predicted: the noise, the clean actions, or a mix of both
    sampler: DiffusionSampler = "ddim"  # when it runs; each call may choose another
    timestep_spacing: TimestepSpacing = "trailing"  # leading leaves the noisiest out; it is LeRobot's
    clip_range: float | None = 1.0  # bound of the clean actions' estimate at each denoising step; null: free

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

    sigma_min: float = 0.0  # noise that is left at the end of the line
    sampler: FlowSampler = "euler"  # when it runs; each call may choose another
    timestep_scale: float = 1.0  # of what the transformer is told of t: 1000 moves all of its embedding, 1 is LeRobot's
    timestep_sampling: TimestepSampling = "beta"  # of the times trained on; beta favours noisy ones
    beta_scale: float = 0.999  # beta: times are beta_scale * (1 - Beta(beta_alpha, beta_beta))
    beta_alpha: float = 1.5  # beta: the first exponent
    beta_beta: float = 1.0  # beta: the second exponent

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
