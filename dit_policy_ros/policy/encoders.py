"""From pictures, state and words to the conditioning vector.

One observation step is `[state, environment state, camera 0, camera 1, ..., text]`, without what the policy
does not have; the steps follow each other, earliest first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import PolicyConfig
from .draws import Draws
from .preprocessing import Preprocessor
from .text import make_text_encoder
from .vision import make_vision_encoder


class ObservationEncoder(nn.Module):
    """Everything a policy sees, as one vector.

    Each part can be had alone (`text_features`, `image_features`), so that a caller decides when each is
    computed; `assemble` puts them together.
    """

    def __init__(self, config: PolicyConfig, tokenizer: Any | None = None):
        super().__init__()
        vision = config.observation_encoder.vision
        text_dim = config.transformer.hidden_dim
        normalize = config.normalization_mapping.get("VISUAL") == "MEAN_STD"
        self.cameras = list(config.cameras)
        self.text_encoder = make_text_encoder(config.observation_encoder.text, text_dim, tokenizer)
        self.null_text = nn.Parameter(torch.zeros(text_dim)) if config.instruction_dropout > 0 else None
        preprocessors = [Preprocessor(vision, shape, normalize) for shape in config.cameras.values()]
        self.preprocessors = nn.ModuleList(preprocessors)
        self.resized_shapes = {
            key: preprocessor.resized_shape for key, preprocessor in zip(self.cameras, preprocessors, strict=True)
        }
        shapes = [preprocessor.shape for preprocessor in preprocessors]
        own = vision.use_separate_encoder_per_camera or not shapes
        served = [[shape] for shape in shapes] if own else [shapes]
        encoders = [make_vision_encoder(vision, each, text_dim) for each in served]
        self.vision_encoders = nn.ModuleList(encoders)
        self.image_dim: int = encoders[0].features_dim if encoders else 0
        self.step_dim = (
            config.state_dim
            + config.environment_state_dim
            + len(self.cameras) * self.image_dim
            + (0 if self.text_encoder is None else text_dim)
        )
        self.conditioning_dim: int = config.n_obs_steps * self.step_dim

    def text_features(self, tasks: Sequence[str] | None, without_instruction: bool | Tensor = False) -> Tensor | None:
        """B instructions -> (B, text_dim), or None for a policy without words.

        without_instruction: True, or (B,) bool for some of them, gives the learned null vector instead. Raises
        ValueError if the policy has none, or a task is missing or has no words.
        """
        if self.null_text is None and without_instruction is not False:
            raise ValueError(
                "this policy has not learned to act without an instruction: train it with instruction_dropout above 0"
            )
        if self.text_encoder is None:
            return None
        if tasks is None:
            raise ValueError("this policy follows instructions: it needs a task for each sample")
        if self.null_text is None or without_instruction is False:
            return self.text_encoder(tasks)
        null = self.null_text.expand(len(tasks), -1)
        if without_instruction is True:
            return null
        return torch.where(torch.as_tensor(without_instruction).unsqueeze(1), null, self.text_encoder(tasks))

    def frame_features(
        self, images: Mapping[str, Tensor], text: Tensor | None, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """Every camera's pictures {key: (B, n, 3, H, W)} -> {key: (B, n, image_dim)}; text (B, text_dim).

        While training, cameras that share an encoder and a shape go through it together.
        """
        if not self.training:
            return {key: self.image_features(key, images[key], text) for key in self.cameras}
        pictures = {key: self.pictures(key, images[key], draws) for key in self.cameras}
        together: dict[tuple[int, torch.Size], list[str]] = {}
        for key, each in pictures.items():
            together.setdefault((self._encoder_of(key), each.shape), []).append(key)
        found: dict[str, Tensor] = {}
        for (encoder, shape), keys in together.items():
            joined = torch.cat([pictures.pop(key) for key in keys]) if len(keys) > 1 else pictures.pop(keys[0])
            words = None if text is None else text.repeat(len(keys), 1)
            features = self._encoded(encoder, joined, words).view(len(keys), *shape[:2], -1)
            found |= dict(zip(keys, features, strict=True))
        return found

    def image_features(self, key: str, images: Tensor, text: Tensor | None) -> Tensor:
        """A camera's pictures (B, n, 3, H, W) and text features (B, text_dim) -> (B, n, image_dim).

        n is any number of observation steps: each picture's feature depends on no other.
        """
        pictures = self.pictures(key, images)
        return self._encoded(self._encoder_of(key), pictures, text).view(*pictures.shape[:2], -1)

    def pictures(self, key: str, images: Tensor, draws: Draws | None = None) -> Tensor:
        """A camera's pictures (B, n, 3, H, W) as its encoder gets them; augmented in training mode, from `draws`."""
        pictures: Tensor = self.preprocessors[self.cameras.index(key)](images, draws)
        return pictures

    def _encoder_of(self, key: str) -> int:
        return self.cameras.index(key) if len(self.vision_encoders) > 1 else 0

    def _encoded(self, encoder: int, pictures: Tensor, text: Tensor | None) -> Tensor:
        """pictures (B, n, 3, H, W), text (B, text_dim) -> (B * n, image_dim)."""
        words = None if text is None else text.repeat_interleave(pictures.shape[1], dim=0)
        features: Tensor = self.vision_encoders[encoder](pictures.flatten(0, 1), words)
        return features

    def assemble(self, states: Sequence[Tensor], frames: Mapping[str, Tensor], text: Tensor | None) -> Tensor:
        """The conditioning, (B, n_obs * step_dim).

        states: the robot's and the environment's (B, n_obs, S), normalised, as far as the policy has them; frames
        {camera key: (B, n_obs, image_dim)}; text (B, text_dim).
        """
        parts = [*states, *(frames[key] for key in self.cameras)]
        if text is not None:
            parts.append(text.unsqueeze(1).expand(-1, parts[0].shape[1], -1))
        return torch.cat(parts, dim=-1).flatten(1)

    def replace_text(self, conditioning: Tensor, text: Tensor) -> Tensor:
        """The conditioning (B, n_obs * step_dim) with other words (B, text_dim), pictures' features as they are."""
        steps = conditioning.unflatten(1, (-1, self.step_dim))
        words = text.unsqueeze(1).expand(-1, steps.shape[1], -1)
        return torch.cat([steps[..., : -words.shape[-1]], words], dim=-1).flatten(1)
