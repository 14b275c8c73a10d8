"""Vision encoders: a picture, and where it modulates them the instruction, to one vector.

Each takes images (N, 3, H, W), normalised, and the text feature of each, (N, text_dim) or None for a policy
without words, and gives (N, features_dim).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contradictions import ConfigurationError
from .resnet import ResNet
from .towers import load_tower, reset_tower_buffers
from .trainable_vit import clip_cls, dinov3_cls
from .vision_configuration import ClipVisionConfig, DinoV3VisionConfig, ResNetConfig, VisionConfig, ViTConfig


class TextPooling(nn.Module):
    """Attention pooling of a ViT's patch tokens with the instruction as the query: the words choose where to look.

    One cross-attention ("Attention is all you need", 3.2) whose query is the text feature. The patches are
    normalised first: a CLIP ViT leaves outliers in them that would decide the softmax alone.
    """

    def __init__(self, hidden_dim: int, text_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_dim)
        self.query = nn.Linear(text_dim, hidden_dim)
        self.key_value = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, patches: Tensor, text: Tensor) -> Tensor:
        """patches (N, P, hidden_dim), text (N, text_dim) -> (N, hidden_dim)."""
        query = self._by_head(self.query(text).unsqueeze(1))
        key, value = (self._by_head(x) for x in self.key_value(self.norm(patches)).chunk(2, dim=-1))
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).flatten(1))

    def _by_head(self, x: Tensor) -> Tensor:
        """(N, L, hidden_dim) -> (N, heads, L, hidden_dim / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ViT(nn.Module):
    """A pretrained vision transformer's CLS token and, with `text_pooling`, what the words pool of its patches.

    `model` is transformers' tower.
    """

    def __init__(self, config: ViTConfig, kind: str, text_dim: int):
        super().__init__()
        self.model: Any = load_tower(kind, config.backbone, config.backbone_config)
        hidden: int = self.model.config.hidden_size
        self.text_pooling = None
        if config.text_pooling:
            if hidden % config.text_pooling_heads:
                raise ConfigurationError(
                    f"vision.text_pooling_heads {config.text_pooling_heads} does not divide the backbone's width "
                    f"{hidden}"
                )
            self.text_pooling = TextPooling(hidden, text_dim, config.text_pooling_heads)
        self.features_dim = hidden * (2 if config.text_pooling else 1)

    def forward(self, images: Tensor, text: Tensor | None) -> Tensor:
        """images (N, 3, H, W), text (N, text_dim) or None -> (N, features_dim)."""
        if self.text_pooling is None:
            return self.cls(images)
        cls, patches = self.tokens(images)
        return torch.cat([cls, self.text_pooling(patches, text)], dim=-1)

    def cls(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> the CLS token (N, hidden) of `tokens`, with less work (trainable_vit.py)."""
        raise NotImplementedError

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, 3, H, W) -> the CLS token (N, hidden), the patch tokens (N, P, hidden)."""
        raise NotImplementedError

    def check_input(self, shape: tuple[int, int]) -> None:
        """Raises ConfigurationError if the ViT does not take pictures of shape (H, W)."""
        raise NotImplementedError

    def reset_buffers(self, device: torch.device | str) -> None:
        """Makes the tables that are not in the state_dict anew, on a device."""
        reset_tower_buffers(self.model, device)


class ClipVision(ViT):
    """A CLIP ViT (arXiv 2103.00020). Its CLS token goes through CLIP's last norm only if so configured."""

    def __init__(self, config: ClipVisionConfig, text_dim: int):
        super().__init__(config, "CLIPVision", text_dim)
        self.use_post_layernorm = config.use_post_layernorm
        self.model.post_layernorm.requires_grad_(config.use_post_layernorm)

    def cls(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> the CLS token (N, hidden)."""
        cls = clip_cls(self.model, images)
        return self.model.post_layernorm(cls) if self.use_post_layernorm else cls

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, 3, H, W) -> the CLS token (N, hidden), the patch tokens (N, P, hidden) before the last norm."""
        output = self.model(pixel_values=images)
        cls = output.pooler_output if self.use_post_layernorm else output.last_hidden_state[:, 0]
        return cls, output.last_hidden_state[:, 1:]

    def check_input(self, shape: tuple[int, int]) -> None:
        """Raises ConfigurationError if the ViT, whose positions are learned, does not take pictures of shape (H, W)."""
        for problem in ClipVisionConfig.size_problems(shape, self.model.config.image_size):
            raise ConfigurationError(problem)


class DinoV3Vision(ViT):
    """A DINOv3 ViT (arXiv 2508.10104), its tokens after the last norm.

    In training mode transformers rescales its positions at random, as in DINOv3's own pretraining. Not here:
    what a policy must learn of a picture is where things are, and the random crop already moves them.
    """

    def __init__(self, config: DinoV3VisionConfig, text_dim: int):
        super().__init__(config, "DINOv3ViT", text_dim)
        self.model.embeddings.mask_token.requires_grad_(False)  # of the pretraining only
        self.model.rope_embeddings.eval()

    def cls(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> the CLS token (N, hidden), after the last norm."""
        return dinov3_cls(self.model, images)

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (N, 3, H, W) -> the CLS token (N, hidden), the patch tokens (N, P, hidden), after the last norm."""
        tokens = self.model(pixel_values=images).last_hidden_state
        return tokens[:, 0], tokens[:, 1 + self.model.config.num_register_tokens :]

    def check_input(self, shape: tuple[int, int]) -> None:
        """Raises ConfigurationError if a side of (H, W) is no multiple of the patch: the rest would not be seen."""
        for problem in DinoV3VisionConfig.size_problems(shape, self.model.config.patch_size):
            raise ConfigurationError(problem)

    def train(self, mode: bool = True) -> "DinoV3Vision":
        """The positions stay those of evaluation mode."""
        super().train(mode)
        self.model.rope_embeddings.eval()
        return self


def make_vision_encoder(config: VisionConfig, input_shapes: list[tuple[int, int]], text_dim: int) -> ViT | ResNet:
    """The vision encoder a configuration describes, for pictures of the given (H, W). Raises ConfigurationError."""
    if isinstance(config, ResNetConfig):
        return ResNet(config, text_dim)
    encoder: ViT
    if isinstance(config, ClipVisionConfig):
        encoder = ClipVision(config, text_dim)
    elif isinstance(config, DinoV3VisionConfig):
        encoder = DinoV3Vision(config, text_dim)
    else:
        raise TypeError(f"no vision encoder for {type(config).__name__}; registered: clip, dinov3, resnet")
    for shape in input_shapes:
        encoder.check_input(shape)
    return encoder
