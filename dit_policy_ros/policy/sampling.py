"""From noise to actions: the loops of DDPM, DDIM and Euler integration.

A loop takes `predict(x (B, T, A), timestep (B,)) -> (B, T, A)`, the transformer with its conditioning filled
in.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .objectives import Diffusion, FlowMatching

Predict = Callable[[Tensor, Tensor], Tensor]


def draw_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of like's dtype on its device, whichever device the generator lives on."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def diffusion_timesteps(num_train_timesteps: int, steps: int, spacing: str) -> list[int]:
    """The timesteps a sampler visits, noisiest first (arXiv 2305.08891, table 2).

    "trailing" starts at num_train_timesteps - 1; "leading" ends at 0 and misses the noisiest ones.
    """
    if spacing == "leading":
        return [i * (num_train_timesteps // steps) for i in reversed(range(steps))]
    return [round(num_train_timesteps - i * num_train_timesteps / steps) - 1 for i in range(steps)]


def ddpm_step(x: Tensor, clean: Tensor, noise: Tensor, alpha_bar: float, alpha_bar_next: float) -> Tensor:
    """x_t -> x_s: a draw of the posterior q(x_s | x_t, x_0 = clean) (arXiv 2006.11239, eq. 6 and 7).

    alpha_bar and alpha_bar_next are the signal shares at t and at the less noisy s.
    """
    alpha = alpha_bar / alpha_bar_next
    mean = (math.sqrt(alpha_bar_next) * (1 - alpha) * clean + math.sqrt(alpha) * (1 - alpha_bar_next) * x) / (
        1 - alpha_bar
    )
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha)
    return mean + math.sqrt(variance) * noise


def ddim_step(clean: Tensor, epsilon: Tensor, alpha_bar_next: float) -> Tensor:
    """x_t -> x_s without randomness: (arXiv 2010.02502, eq. 12 with sigma = 0)."""
    return math.sqrt(alpha_bar_next) * clean + math.sqrt(1 - alpha_bar_next) * epsilon


def sample_diffusion(
    predict: Predict, x: Tensor, objective: Diffusion, steps: int, generator: torch.Generator | None
) -> Tensor:
    """Denoises x (B, T, A) from the schedule's noisiest timestep to clean actions, by the configured sampler."""
    config = objective.config
    visited = diffusion_timesteps(config.num_train_timesteps, steps, config.timestep_spacing)
    signal = [*objective.alphas_cumprod[visited].tolist(), 1.0]
    for timestep, (alpha_bar, alpha_bar_next) in zip(visited, pairwise(signal), strict=True):
        prediction = predict(x, torch.full((len(x),), timestep, device=x.device))
        clean, epsilon = _clean_and_epsilon(x, prediction, alpha_bar, config.prediction_type)
        if config.clip_range is not None:
            # As in diffusers, epsilon stays the one of the unclipped estimate.
            clean = clean.clamp(-config.clip_range, config.clip_range)
        if config.sampler == "ddim":
            x = ddim_step(clean, epsilon, alpha_bar_next)
        else:
            x = ddpm_step(x, clean, draw_noise(x.shape, x, generator), alpha_bar, alpha_bar_next)
    return x


def _clean_and_epsilon(x: Tensor, prediction: Tensor, alpha_bar: float, kind: str) -> tuple[Tensor, Tensor]:
    """Solves x_t = sqrt(alpha_bar) clean + sqrt(1 - alpha_bar) epsilon for what was not predicted."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if kind == "epsilon":
        return (x - noise * prediction) / signal, prediction
    return prediction, (x - signal * prediction) / noise


def sample_flow(predict: Predict, x: Tensor, steps: int) -> Tensor:
    """Integrates the velocity from noise x (B, T, A) at t=0 to actions at t=1 by Euler's method, equal steps."""
    for i in range(steps):
        x = x + predict(x, torch.full((len(x),), i / steps, device=x.device)) / steps
    return x


def sample(
    predict: Predict,
    x: Tensor,
    objective: Diffusion | FlowMatching,
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise x (B, T, A) -> normalised actions (B, T, A) in `steps` calls of predict."""
    if isinstance(objective, Diffusion):
        return sample_diffusion(predict, x, objective, steps, generator)
    return sample_flow(predict, x, steps)
