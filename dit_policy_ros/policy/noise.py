"""The random numbers that a chunk is sampled from: drawn from a seed, or the caller's own, checked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import as_tensor
from .plan import Plan


def draw_noise(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of like's dtype on its device, whichever device the generator lives on."""
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=like.dtype).to(like.device)


def check_noise(noise: Any, shape: tuple[int, ...]) -> Tensor:
    """The noise a caller gives, a tensor or array, as a tensor.

    Raises ValueError if its shape, dtype or values cannot be meant.
    """
    noise = as_tensor("noise", noise)
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise must have the shape {shape} (batch, horizon, actions), got {tuple(noise.shape)}")
    if not noise.is_floating_point():
        raise ValueError(f"noise must be floating point, standard normal, got {noise.dtype}")
    if not noise.isfinite().all():
        raise ValueError(f"noise must be finite, got {int((~noise.isfinite()).sum())} values that are not")
    return noise


def draw_step_noise(plan: Plan, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """What `plan.run` wants as step_noise for x (B, T, A): (steps, B, T, A), one draw a step in order, or None."""
    if not plan.draws_noise:
        return None
    return torch.stack([draw_noise(x.shape, x, generator) for _ in range(plan.steps)])
