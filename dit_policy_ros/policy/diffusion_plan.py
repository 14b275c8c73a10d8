"""The samplers of diffusion: DDPM, DDIM and DPM-Solver++ (2M)."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .objectives import Diffusion
from .plan import Level, Plan, Predict, combination


def diffusion_timesteps(num_train_timesteps: int, steps: int, spacing: str) -> list[int]:
    """The timesteps a sampler visits, noisiest first (arXiv 2305.08891, table 2).

    "trailing" starts at num_train_timesteps - 1; "leading" ends at 0 and misses the noisiest ones.
    """
    if spacing == "leading":
        return [i * (num_train_timesteps // steps) for i in reversed(range(steps))]
    return [round(num_train_timesteps - i * num_train_timesteps / steps) - 1 for i in range(steps)]


@dataclass(frozen=True)
class Update:
    """One step of a diffusion sampler: the factors whose sum is the next, less noisy x.

    `clean` is the (clipped) estimate of the clean actions, `previous` that of the step before.
    """

    x: float = 0.0
    out: float = 0.0
    clean: float = 0.0
    previous: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, eq=False)
class DiffusionPlan(Plan):
    """DDPM, DDIM or DPM-Solver++: an estimate of the clean actions, then a step towards it."""

    updates: tuple[Update, ...]
    clip_range: float | None

    def clip(self, clean: Tensor) -> Tensor:
        """An estimate of the clean actions within +-clip_range."""
        return clean if self.clip_range is None else clean.clamp(-self.clip_range, self.clip_range)

    def _loop(self, predict: Predict, x: Tensor, step_noise: Tensor | None) -> Tensor:
        previous: Tensor | None = None
        for call, (level, update) in enumerate(zip(self.levels, self.updates, strict=True)):
            out = predict(x, call)
            clean = self.clip(level.clean(x, out))  # as in diffusers, `update.out` stays that of the unclipped estimate
            noise = None if step_noise is None else step_noise[call]
            x = combination(
                (update.x, x),
                (update.out, out),
                (update.clean, clean),
                (update.previous, previous),
                (update.noise, noise),
            )
            previous = clean
        return x


def diffusion_level(alpha_bar: float, prediction_type: str) -> Level:
    """What the output says at the signal share alpha_bar, by what it predicts (arXiv 2202.00512, appendix D, for v)."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if prediction_type == "epsilon":
        return Level(signal, noise, of_x=1.0, of_out=-noise, over=signal)
    if prediction_type == "sample":
        return Level(signal, noise, of_x=0.0, of_out=1.0)
    return Level(signal, noise, of_x=signal, of_out=-noise)


def ddpm_update(alpha_bar: float, alpha_bar_next: float) -> Update:
    """A draw of the posterior q(x_s | x_t, x_0 = clean) (arXiv 2006.11239, eq. 6 and 7).

    alpha_bar and alpha_bar_next are the signal shares at t and at the less noisy s.
    """
    alpha = alpha_bar / alpha_bar_next
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha)
    return Update(
        x=math.sqrt(alpha) * (1 - alpha_bar_next) / (1 - alpha_bar),
        clean=math.sqrt(alpha_bar_next) * (1 - alpha) / (1 - alpha_bar),
        noise=math.sqrt(variance),
    )


def ddim_update(level: Level, alpha_bar_next: float, prediction_type: str) -> Update:
    """Along the estimates of the clean actions and of epsilon, no randomness (arXiv 2010.02502, eq. 12, sigma = 0)."""
    of_x, of_out = {
        "epsilon": (0.0, 1.0),
        "sample": (1 / level.noise, -level.signal / level.noise),
        "v_prediction": (level.noise, level.signal),
    }[prediction_type]
    noise = math.sqrt(1 - alpha_bar_next)
    return Update(x=noise * of_x, out=noise * of_out, clean=math.sqrt(alpha_bar_next))


def dpm_solver_update(level: Level, alpha_bar_next: float, level_before: Level | None) -> Update:
    """DPM-Solver++ (2M) (arXiv 2211.01095, algorithm 2): a line through the last two estimates of the clean actions.

    Of first order (the same as DDIM's) at the first step, and at the last, where log(signal / noise) is infinite.
    """
    if alpha_bar_next == 1:
        return Update(clean=1.0)
    signal, noise = math.sqrt(alpha_bar_next), math.sqrt(1 - alpha_bar_next)
    step = math.log(signal / noise) - math.log(level.signal / level.noise)
    towards = -signal * math.expm1(-step)
    if level_before is None:
        return Update(x=noise / level.noise, clean=towards)
    step_before = math.log(level.signal / level.noise) - math.log(level_before.signal / level_before.noise)
    slope = step / (2 * step_before)
    return Update(x=noise / level.noise, clean=towards * (1 + slope), previous=-towards * slope)


def diffusion_plan(objective: Diffusion, sampler: str, steps: int, device: torch.device) -> DiffusionPlan:
    """The plan of a sampler of diffusion with that many steps, both valid."""
    config = objective.config
    visited = diffusion_timesteps(config.num_train_timesteps, steps, config.timestep_spacing)
    shares = [*objective.alphas_cumprod[visited].tolist(), 1.0]
    levels = tuple(diffusion_level(share, config.prediction_type) for share in shares[:-1])
    updates = []
    for i, (alpha_bar, alpha_bar_next) in enumerate(pairwise(shares)):
        if sampler == "ddpm":
            updates.append(ddpm_update(alpha_bar, alpha_bar_next))
        elif sampler == "ddim":
            updates.append(ddim_update(levels[i], alpha_bar_next, config.prediction_type))
        else:
            updates.append(dpm_solver_update(levels[i], alpha_bar_next, levels[i - 1] if i else None))
    return DiffusionPlan(
        sampler,
        steps,
        timesteps=torch.tensor(visited, dtype=torch.float32, device=device),
        clean_timestep=objective.clean_timestep,
        levels=levels,
        updates=tuple(updates),
        clip_range=config.clip_range,
    )
