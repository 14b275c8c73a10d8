"""Colour jitter of a batch of pictures on their device, each sample by factors of its own.

What each factor does is torchvision's `adjust_brightness`, `adjust_contrast`, `adjust_saturation` and `adjust_hue`,
which take one factor for all pictures. Pictures are (B, n, 3, H, W) in [0, 1], factors (B,): the n pictures of a sample
get the same, so that what changes between them is what moved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .draws import Draws
from .vision_configuration import VisionConfig

_LUMA = (0.2989, 0.587, 0.114)
"""Red's, green's and blue's shares of the brightness (ITU-R BT.601)."""


@dataclass(frozen=True)
class Jitter:
    """What is done to each sample, (B,) each: brightness, contrast and saturation times a factor, hue shifted by turns.

    None leaves that as it is.
    """

    brightness: Tensor | None = None
    contrast: Tensor | None = None
    saturation: Tensor | None = None
    hue: Tensor | None = None

    @classmethod
    def drawn(cls, config: VisionConfig, count: int, device: torch.device, draws: Draws) -> "Jitter":
        """Factors uniform in 1 - x to 1 + x, not below 0, and shifts in -x to x turns, x being the configuration's."""
        drawn = {}
        for name in ("brightness", "contrast", "saturation"):
            if strength := getattr(config, name):
                low = max(0.0, 1 - strength)
                drawn[name] = low + (1 + strength - low) * draws.uniform((count,), device)
        if config.hue:
            drawn["hue"] = config.hue * (2 * draws.uniform((count,), device) - 1)
        return cls(**drawn)

    def __call__(self, images: Tensor) -> Tensor:
        """In the order of the fields."""
        if self.brightness is not None:
            images = (images * _by_sample(self.brightness)).clamp(0, 1)
        if self.contrast is not None:
            images = _blend(images, _grey(images).mean(dim=(-3, -2, -1), keepdim=True), self.contrast)
        if self.saturation is not None:
            images = _blend(images, _grey(images), self.saturation)
        if self.hue is not None:
            images = shift_hue(images, self.hue)
        return images


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Colours turned around HSV's grey axis (Smith 1978, "Color gamut transform pairs"), value and saturation kept.

    A hue of a sixth of a turn brings red to yellow, and so on: each channel is the value less the chroma times a
    trapezoid of its distance in hue.
    """
    value, chroma, hue = _hue(images)
    hue = hue + 6 * _by_sample(turns)
    distance = torch.cat([(hue + peak) % 6 for peak in (5, 3, 1)], dim=-3)
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)


def _hue(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, chroma and hue in sixths of a turn, (B, n, 1, H, W) each; a grey pixel's hue is 0."""
    red, green, blue = images.split(1, dim=-3)
    value, low = images.amax(-3, keepdim=True), images.amin(-3, keepdim=True)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    of_blue = 4 + (red - green) / safe
    of_green = torch.where(value == green, 2 + (blue - red) / safe, of_blue)
    hue = torch.where(value == red, (green - blue) / safe, of_green)
    return value, chroma, torch.where(chroma > 0, hue, 0)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=-3)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor of the pictures, the rest of the other; beyond 1 away from it."""
    return torch.lerp(other.expand_as(images), images, _by_sample(factor).expand_as(images)).clamp(0, 1)


def _by_sample(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1, 1)
