"""A convolutional vision encoder, trained from scratch, whose layers the instruction modulates."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .vision_configuration import ResNetConfig


class FilmConvolution(nn.Module):
    """3x3 convolution, GroupNorm, FiLM (arXiv 1709.07871) by the text feature, SiLU."""

    def __init__(self, channels: int, width: int, stride: int, groups: int, text_dim: int | None):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride, padding=1)
        self.norm = nn.GroupNorm(groups, width)
        self.film = None if text_dim is None else nn.Linear(text_dim, 2 * width)

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        """x (N, channels, H, W), text (N, text_dim), None without FiLM -> (N, width, H / stride, W / stride)."""
        x = self.norm(self.conv(x))
        if self.film is not None:
            scale, shift = self.film(text)[:, :, None, None].chunk(2, dim=1)
            x = x * (1 + scale) + shift
        return F.silu(x)


class ResidualBlock(nn.Module):
    """Two convolutions around a skip connection, the first one modulated by the text feature."""

    def __init__(self, width: int, groups: int, text_dim: int | None):
        super().__init__()
        self.first = FilmConvolution(width, width, 1, groups, text_dim)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(groups, width))

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        """x (N, width, H, W), text (N, text_dim), None without FiLM -> (N, width, H, W)."""
        return F.silu(x + self.second(self.first(x, text)))


class ResNet(nn.Module):
    """A convolutional encoder ending in keypoints, its layers modulated by the instruction.

    GroupNorm and spatial soft-argmax as in Diffusion Policy (arXiv 2303.04137); FiLM because an encoder blind
    to the words must carry every object to the transformer, and at small size the policy then ignores the
    instruction.
    """

    def __init__(self, config: ResNetConfig, text_dim: int):
        super().__init__()
        film_dim = text_dim if config.film else None
        groups, kernel, stride = config.norm_groups, config.stem_kernel, config.stem_stride
        self.stem = nn.Sequential(
            nn.Conv2d(3, config.stem_channels, kernel, stride, padding=(kernel - stride + 1) // 2),
            nn.GroupNorm(groups, config.stem_channels),
            nn.SiLU(),
        )
        layers: list[nn.Module] = []
        channels = config.stem_channels
        for stage, width in enumerate(config.widths):
            layers.append(FilmConvolution(channels, width, 1 if stage == 0 else 2, groups, film_dim))
            layers += [ResidualBlock(width, groups, film_dim) for _ in range(config.blocks_per_stage)]
            channels = width
        self.layers = nn.ModuleList(layers)
        self.keypoint_maps = nn.Conv2d(channels, config.num_keypoints, 1)
        self.features_dim = 2 * config.num_keypoints

    def forward(self, images: Tensor, text: Tensor | None) -> Tensor:
        """images (N, 3, H, W), text (N, text_dim), None without FiLM -> keypoints (N, features_dim) in [-1, 1].

        They stand as x0, y0, x1, y1, ...
        """
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x, text)
        return spatial_soft_argmax(self.keypoint_maps(x)).flatten(1)


def spatial_soft_argmax(maps: Tensor) -> Tensor:
    """The expected (x, y) under each map's softmax (arXiv 1504.00702, eq. 3): (N, K, H, W) -> (N, K, 2) in [-1, 1]."""
    height, width = maps.shape[-2:]
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, device=maps.device, dtype=maps.dtype),
        torch.linspace(-1, 1, width, device=maps.device, dtype=maps.dtype),
        indexing="ij",
    )
    return maps.flatten(2).softmax(dim=-1) @ torch.stack([x.flatten(), y.flatten()], dim=-1)
