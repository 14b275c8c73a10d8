"""A camera's pictures as its encoder wants them: the one place where pixels are scaled, cut and normalised."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .draws import Draws
from .jitter import Jitter
from .vision_configuration import VisionConfig


class Preprocessor(nn.Module):
    """A camera's pictures as its encoder wants them: scaled, cut, normalised. The steps are VisionConfig's.

    At training each sample gets a window and a colour jitter of its own, the same for all of its observation steps,
    so that motion between them stays what it was.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig, image_shape: tuple[int, int], normalize: bool):
        super().__init__()
        self.config = config
        self.image_shape = image_shape
        self.shape = config.input_shape(image_shape)
        self._mean_std = (config.image_mean, config.image_std) if normalize else ((0.0,) * 3, (1.0,) * 3)
        self.reset_buffers("cpu")

    def reset_buffers(self, device: torch.device | str) -> None:
        """Makes the tables that are not in the state_dict anew, on a device."""
        for name, values in zip(("mean", "std"), self._mean_std, strict=True):
            self.register_buffer(name, torch.tensor(values, device=device).view(3, 1, 1), persistent=False)

    @property
    def resized_shape(self) -> tuple[int, int]:
        """(H, W) after scaling, before the cut."""
        if self.config.resize_shape is None:
            return self.image_shape
        if self.config.resize_mode == "stretch":
            return self.config.resize_shape
        height, width = self.image_shape
        scale = max(self.config.resize_shape[0] / height, self.config.resize_shape[1] / width)
        return round(height * scale), round(width * scale)

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, n_obs, 3, H, W), uint8 or float in [0, 1] -> (B, n_obs, 3, *shape) float32, normalised.

        In training mode it augments, by `draws`.
        """
        return (self.augmented(images, draws) - self.mean).div_(self.std)

    def augmented(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """What `forward` gives before it normalises, (B, n_obs, 3, *shape) float32 in [0, 1]: fit to be looked at."""
        draws = draws or Draws()
        if images.shape[-2:] != self.resized_shape:
            images = self.resize(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        images = as_float(self.cut(images, draws))  # cut first: bytes are a quarter of floats
        if not self.training:
            return images
        return Jitter.drawn(self.config, len(images), images.device, draws)(images)

    def resize(self, images: Tensor) -> Tensor:
        """(N, 3, H, W), uint8 or float in [0, 1] -> (N, 3, *resized_shape) float32 in [0, 1].

        Pictures that already have that shape pass, so a training cache may hold them scaled.
        """
        images = as_float(images)
        if images.shape[-2:] == self.resized_shape:
            return images
        return F.interpolate(images, self.resized_shape, mode="bilinear", align_corners=False, antialias=True)

    def cut(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, n_obs, 3, H, W) -> (B, n_obs, 3, *shape); beyond the picture's edge, its edge."""
        (height, width), (rows, columns) = self.shape, images.shape[-2:]
        # Round half to even, as torchvision's CenterCrop, so that foreign checkpoints see the same pixels.
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        if not self.training:
            return images[..., top : top + height, left : left + width]
        draws, shift = draws or Draws(), self.config.random_shift
        tops = self._starts(len(images), top, rows - height, images.device, draws)
        lefts = self._starts(len(images), left, columns - width, images.device, draws)
        for axis, length in ((-2, rows), (-1, columns)) if shift else ():
            edge = torch.arange(-shift, length + shift, device=images.device).clamp(0, length - 1)
            images = images.index_select(axis, edge)
        # Every window there is, as a view, of which each sample takes one: a single copy, without waiting for a device.
        windows = images.unfold(-2, height, 1).unfold(-2, width, 1)
        return windows[torch.arange(len(images), device=images.device), :, :, tops, lefts]

    def _starts(self, count: int, centre: int, spare: int, device: torch.device, draws: Draws) -> Tensor:
        """Where each sample's window starts in pictures that random_shift has widened, (count,)."""
        start = torch.full((count,), centre, device=device)
        if self.config.crop_is_random:
            start = draws.integers(0, spare + 1, (count,), device)
        shift = self.config.random_shift
        return start + draws.integers(0, 2 * shift + 1, (count,), device)


def as_float(images: Tensor) -> Tensor:
    """Pictures uint8 or float in [0, 1] -> float32 in [0, 1]."""
    return images.float() if images.is_floating_point() else images.float() / 255
