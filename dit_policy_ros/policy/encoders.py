"""From pictures, state and words to the conditioning vector.

One observation step is `[state, camera 0, camera 1, ..., text]`; the steps follow each other, earliest first.
"""

import logging
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from .configuration import (
    ClipTextConfig,
    ClipVisionConfig,
    ConfigurationError,
    PolicyConfig,
    ResNetConfig,
    TextConfig,
    VisionConfig,
)

logger = logging.getLogger(__name__)

TEXT_CACHE_SIZE = 1024


class Preprocessor(nn.Module):
    """A camera's pictures as its encoder wants them: scaled, cut, normalised. The steps are VisionConfig's.

    At training each sample gets a window of its own, the same for all of its observation steps, so that
    motion between them stays what it was.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig, image_shape: tuple[int, int], normalize: bool):
        super().__init__()
        self.config = config
        self.image_shape = image_shape
        self.shape = config.input_shape(image_shape)
        mean, std = (config.image_mean, config.image_std) if normalize else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def resized_shape(self) -> tuple[int, int]:
        """(H, W) after scaling, before the cut."""
        if self.config.resize_shape is None:
            return self.image_shape
        height, width = self.image_shape
        scale = max(self.config.resize_shape[0] / height, self.config.resize_shape[1] / width)
        return round(height * scale), round(width * scale)

    def forward(self, images: Tensor) -> Tensor:
        """(B, n_obs, 3, H, W), uint8 or float in [0, 1] -> (B, n_obs, 3, *shape) float32, normalised."""
        batch, steps = images.shape[:2]
        images = self.resize(images.flatten(0, 1))
        images = self.cut(images.view(batch, steps, *images.shape[1:]))
        return (images - self.mean) / self.std

    def resize(self, images: Tensor) -> Tensor:
        """(N, 3, H, W), uint8 or float in [0, 1] -> (N, 3, *resized_shape) float32 in [0, 1].

        Pictures that already have that shape pass, so a training cache may hold them scaled.
        """
        images = images.float() if images.is_floating_point() else images.float() / 255
        if images.shape[-2:] == self.resized_shape:
            return images
        return F.interpolate(images, self.resized_shape, mode="bilinear", align_corners=False, antialias=True)

    def cut(self, images: Tensor) -> Tensor:
        """(B, n_obs, 3, H, W) -> (B, n_obs, 3, *shape)."""
        (height, width), (rows, columns) = self.shape, images.shape[-2:]
        # Round half to even, as torchvision's CenterCrop, so that foreign checkpoints see the same pixels.
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        if not self.training:
            return images[..., top : top + height, left : left + width]
        y = self._window(len(images), top, rows, height, images.device)
        x = self._window(len(images), left, columns, width, images.device)
        sample = torch.arange(len(images), device=images.device).view(-1, 1, 1)
        return images[sample, :, :, y[:, :, None], x[:, None, :]].permute(0, 3, 4, 1, 2)

    def _window(self, count: int, centre: int, available: int, size: int, device: torch.device) -> Tensor:
        """Indices (count, size) of random windows into `available` pixels; beyond the edge, the edge's."""
        start = torch.full((count, 1), centre, device=device)
        if self.config.crop_is_random:
            start = torch.randint(available - size + 1, (count, 1), device=device)
        shift = self.config.random_shift
        start = start + torch.randint(-shift, shift + 1, (count, 1), device=device)
        return (start + torch.arange(size, device=device)).clamp(0, available - 1)


class ClipVision(nn.Module):
    """The CLS token of a CLIP ViT (arXiv 2103.00020)."""

    def __init__(self, config: ClipVisionConfig, input_shape: tuple[int, int]):
        super().__init__()
        self.use_post_layernorm = config.use_post_layernorm
        self.model = _load_tower(CLIPVisionModel, CLIPVisionConfig, config.backbone, config.backbone_config)
        size = self.model.config.image_size
        if input_shape != (size, size):
            raise ConfigurationError(
                f"vision.backbone {config.backbone} takes pictures of {size}x{size}, it would get "
                f"{input_shape[0]}x{input_shape[1]}; set vision.crop_shape=[{size},{size}]"
            )
        self.model.post_layernorm.requires_grad_(config.use_post_layernorm)
        self.features_dim: int = self.model.config.hidden_size

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """images (N, 3, H, W); text is not used -> (N, features_dim)."""
        output = self.model(pixel_values=images)
        return output.pooler_output if self.use_post_layernorm else output.last_hidden_state[:, 0]


class FilmConvolution(nn.Module):
    """3x3 convolution, GroupNorm, FiLM (arXiv 1709.07871) by the text feature, SiLU."""

    def __init__(self, channels: int, width: int, stride: int, groups: int, text_dim: int | None):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride, padding=1)
        self.norm = nn.GroupNorm(groups, width)
        self.film = None if text_dim is None else nn.Linear(text_dim, 2 * width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (N, channels, H, W), text (N, text_dim) -> (N, width, H / stride, W / stride)."""
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

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (N, width, H, W), text (N, text_dim) -> (N, width, H, W)."""
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

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """images (N, 3, H, W), text (N, text_dim) -> keypoints (N, features_dim) as x0, y0, x1, ... in [-1, 1]."""
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


class ClipText(nn.Module):
    """A frozen CLIP text tower's pooled output, then a trained projection.

    The tower runs once an instruction: its output is kept, the least recently used of TEXT_CACHE_SIZE
    instructions being forgotten first. The projection is trained and so is applied each time.
    """

    def __init__(self, config: ClipTextConfig, features_dim: int, tokenizer: Any | None):
        super().__init__()
        self.tokenizer = tokenizer or _load_tokenizer(config)
        self.text_encoder = _load_tower(CLIPTextModel, CLIPTextConfig, config.model, config.model_config)
        self.text_encoder.requires_grad_(False).eval()
        self.projection = nn.Linear(self.text_encoder.config.hidden_size, features_dim)
        self._pooled: OrderedDict[str, Tensor] = OrderedDict()
        self.register_load_state_dict_post_hook(lambda module, _: module._pooled.clear())

    def forward(self, tasks: list[str]) -> Tensor:
        """B instructions -> (B, features_dim). Raises ValueError for one without words."""
        return self.projection(self.pooled(tasks))

    def pooled(self, tasks: list[str]) -> Tensor:
        """B instructions -> the frozen tower's output (B, tower's width)."""
        for index, task in enumerate(tasks):
            if not isinstance(task, str) or not task.strip():
                raise ValueError(f"task {index} of the batch is {task!r}; expected an instruction in words")
        features: dict[str, Tensor] = {}
        for task in dict.fromkeys(tasks):
            features[task] = self._pooled[task] if task in self._pooled else self._encode(task)
            self._pooled[task] = features[task]
            self._pooled.move_to_end(task)
        while len(self._pooled) > TEXT_CACHE_SIZE:
            self._pooled.popitem(last=False)
        # A copy, so that what was kept in inference mode may serve a training step.
        return torch.stack([features[task] for task in tasks])

    # Each alone, not as a batch: a feature must not depend, in its last bits, on what else was asked for.
    @torch.no_grad()
    def _encode(self, task: str) -> Tensor:
        limit = self.text_encoder.config.max_position_embeddings
        tokens = self.tokenizer(task, return_tensors="pt")["input_ids"]
        if tokens.shape[1] > limit:
            logger.warning("CLIP reads %d tokens; the end is cut from %r of %d", limit, task, tokens.shape[1])
            tokens = self.tokenizer(task, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        return self.text_encoder(input_ids=tokens.to(self.projection.weight.device)).pooler_output[0]

    def train(self, mode: bool = True) -> "ClipText":
        """The frozen tower stays in evaluation mode."""
        super().train(mode)
        self.text_encoder.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "ClipText":
        self._pooled.clear()  # another device or dtype
        return super()._apply(fn, recurse)


class ObservationEncoder(nn.Module):
    """Everything a policy sees, as one vector."""

    def __init__(self, config: PolicyConfig, tokenizer: Any | None = None):
        super().__init__()
        vision = config.observation_encoder.vision
        text_dim = config.transformer.hidden_dim
        normalize = config.normalization_mapping["VISUAL"] == "MEAN_STD"
        self.cameras = list(config.cameras)
        self.text_encoder = _make_text_encoder(config.observation_encoder.text, text_dim, tokenizer)
        preprocessors = [Preprocessor(vision, shape, normalize) for shape in config.cameras.values()]
        self.preprocessors = nn.ModuleList(preprocessors)
        self.resized_shapes = {
            key: preprocessor.resized_shape for key, preprocessor in zip(self.cameras, preprocessors, strict=True)
        }
        own = vision.use_separate_encoder_per_camera
        encoders = [
            _make_vision_encoder(vision, preprocessor.shape, text_dim)
            for preprocessor in (preprocessors if own else preprocessors[:1])
        ]
        self.vision_encoders = nn.ModuleList(encoders)
        image_dim = encoders[0].features_dim if encoders else 0
        self.step_dim = config.state_dim + len(self.cameras) * image_dim + text_dim
        self.conditioning_dim: int = config.n_obs_steps * self.step_dim

    def forward(self, state: Tensor, images: dict[str, Tensor], tasks: list[str]) -> Tensor:
        """The conditioning, (B, n_obs * step_dim).

        state (B, n_obs, S) normalised; images {feature key: (B, n_obs, 3, H, W)}; B instructions.
        """
        text = self.text_encoder(tasks)
        features = [self.image_features(index, images[key], text) for index, key in enumerate(self.cameras)]
        words = text.unsqueeze(1).expand(-1, state.shape[1], -1)
        return torch.cat([state, *features, words], dim=-1).flatten(1)

    def image_features(self, camera: int, images: Tensor, text: Tensor) -> Tensor:
        """One camera's pictures (B, n_obs, 3, H, W) and text features (B, text_dim) -> (B, n_obs, features_dim)."""
        batch, steps = images.shape[:2]
        pictures = self.preprocessors[camera](images).flatten(0, 1)
        encoder = self.vision_encoders[camera if len(self.vision_encoders) > 1 else 0]
        return encoder(pictures, text.repeat_interleave(steps, dim=0)).view(batch, steps, -1)


def _make_vision_encoder(config: VisionConfig, input_shape: tuple[int, int], text_dim: int) -> ClipVision | ResNet:
    if isinstance(config, ClipVisionConfig):
        return ClipVision(config, input_shape)
    if isinstance(config, ResNetConfig):
        return ResNet(config, text_dim)
    raise TypeError(f"no vision encoder for {type(config).__name__}; registered: clip, resnet")


def _make_text_encoder(config: TextConfig, features_dim: int, tokenizer: Any | None) -> ClipText:
    if isinstance(config, ClipTextConfig):
        return ClipText(config, features_dim, tokenizer)
    raise TypeError(f"no text encoder for {type(config).__name__}; registered: clip")


def _load_tower(model_class: Any, config_class: Any, name: str, config: dict[str, Any] | None) -> Any:
    """A CLIP tower from a configuration (random weights), or else from a local folder or hub name (its weights)."""
    if config is not None:
        model = model_class(config_class.from_dict(config))
    else:
        try:
            model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        except OSError as error:
            raise ConfigurationError(
                f"cannot load {model_class.__name__} from {name!r}: give a local folder with config.json and weights, "
                f"or the name of a model on the Hugging Face hub (needs network). {error}"
            ) from error
        if report["missing_keys"]:
            raise ConfigurationError(f"{name!r} lacks weights of {model_class.__name__}: {report['missing_keys']}")
    # Up to transformers 5.5 the tower sits in a wrapper that 5.6 removes: without it, tensor names are the
    # same in both.
    return getattr(model, "text_model", getattr(model, "vision_model", model))


def _load_tokenizer(config: ClipTextConfig) -> Any:
    from transformers import AutoTokenizer

    if config.model_config is not None:
        raise ConfigurationError("text.model_config is given: pass the tokenizer as well, a configuration has none")
    return AutoTokenizer.from_pretrained(config.model)
