"""The vision encoders' configurations: from the camera's picture to the encoder's input, and what the encoder is."""

from dataclasses import dataclass
from typing import Any, Literal

import draccus

from .contradictions import not_finite, not_positive, unknown_choices

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Named, because --help loses the comment of a field whose annotation has quotes in it.
ResizeMode = Literal["cover", "stretch"]


@dataclass
class VisionConfig(draccus.ChoiceRegistry):
    """What is common to the vision encoders: from the camera's picture to the encoder's input.

    The picture is scaled, keeping its aspect ratio, until it just covers `resize_shape` (`resize_mode`
    "stretch", for LeRobot's checkpoints, scales it to exactly that shape instead), then cut to `crop_shape`
    (default: `resize_shape`): at the centre at inference, anywhere at training if `crop_is_random`. Training may
    also shift the window by up to `random_shift` pixels, edges replicated (DrQ-v2, arXiv 2107.09645). Shapes are
    (H, W). Training may jitter colours as well (jitter.py), each sample by factors of its own.
    """

    resize_shape: tuple[int, int] | None = None  # (H, W) that pictures are scaled to; null: as recorded
    resize_mode: ResizeMode = "cover"  # cover keeps the aspect ratio, stretch does not
    crop_shape: tuple[int, int] | None = None  # (H, W) then cut out, and seen; null: resize_shape
    crop_is_random: bool = True  # where it is cut while training: anywhere, or at the centre as when it runs
    random_shift: int = 0  # pixels; the window is shifted by up to that while training, edges replicated
    brightness: float = 0.0  # colour jitter while training: brightness times 1 - x to 1 + x, each sample its own
    contrast: float = 0.0  # the same of contrast; 0.2 to 0.4 are usual
    saturation: float = 0.0  # the same of saturation
    hue: float = 0.0  # hue shifted by up to x turns, at most 0.5; 0.05 is usual, more changes what colours are called
    use_separate_encoder_per_camera: bool = False  # each camera its own weights
    lr_multiplier: float = 1.0  # of optimizer.lr, for the vision encoders; 0.1 for pretrained ones
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # taken off pixels in [0, 1], by red, green, blue
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # that they are divided by

    @classmethod
    def default_choice_name(cls) -> str:
        """The type meant where a configuration names none."""
        return "clip"

    @property
    def is_modulated_by_text(self) -> bool:
        """Whether a picture's feature depends on the instruction."""
        return False

    def input_shape(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the encoder's input for a picture of (H, W) pixels."""
        return self.crop_shape or self.resize_shape or image_shape

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = unknown_choices(self, "vision") + not_finite(self, "vision")
        if self.crop_shape and self.resize_shape and exceeds(self.crop_shape, self.resize_shape):
            found.append(
                f"vision.crop_shape {self.crop_shape} does not fit into vision.resize_shape {self.resize_shape}"
            )
        for name in ("resize_shape", "crop_shape"):
            shape = getattr(self, name)
            if shape is not None and min(shape) < 1:
                found.append(f"vision.{name} must be positive, got {shape}")
        if self.resize_mode == "stretch" and self.resize_shape is None:
            found.append("vision.resize_mode stretch needs vision.resize_shape: the shape to stretch to")
        if self.random_shift < 0:
            found.append(f"vision.random_shift must be at least 0 pixels, got {self.random_shift}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                found.append(f"vision.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            found.append(f"vision.hue must be in [0, 0.5] turns, got {self.hue}")
        if self.lr_multiplier < 0:
            found.append(f"vision.lr_multiplier must be at least 0, got {self.lr_multiplier}")
        if min(self.image_std) <= 0:
            found.append(f"vision.image_std must be positive, got {self.image_std}")
        return found

    def input_problems(self, image_shape: tuple[int, int], camera: str) -> list[str]:
        """What a camera's pictures of (H, W) contradict here, a sentence each."""
        if self.crop_shape and not self.resize_shape and exceeds(self.crop_shape, image_shape):
            return [
                f"vision.crop_shape {self.crop_shape} does not fit into {camera} of {image_shape}; set a smaller "
                "vision.crop_shape, or vision.resize_shape to scale the pictures first"
            ]
        return []


@dataclass
class ViTConfig(VisionConfig):
    """The CLS token of a vision transformer. `backbone` is a hub name or a local folder holding its weights.

    If `backbone_config` (the fields of transformers' configuration of that model) is given, the ViT is built
    from it with random weights and `backbone` is not read: to train from scratch, and how a checkpoint loads
    without a network.

    `text_pooling` adds, beside the CLS token, an attention pooling of the patch tokens whose query is the
    instruction's feature, with `text_pooling_heads` heads: the words choose where to look. Checkpoints of
    LeRobot and of the original have none.
    """

    resize_shape: tuple[int, int] | None = (256, 256)  # (H, W) that pictures are scaled to; null: as recorded
    crop_shape: tuple[int, int] | None = (224, 224)  # (H, W) then cut out, and seen; null: resize_shape
    lr_multiplier: float = 0.1  # of optimizer.lr, for the vision encoders, which are pretrained
    backbone: str = ""  # name on the Hugging Face hub, or a local folder with weights
    backbone_config: dict[str, Any] | None = None  # a ViT with random weights instead, by transformers' fields
    text_pooling: bool = False  # the words choose where to look: patches pooled with the instruction as the query
    text_pooling_heads: int = 8  # of that attention; must divide the ViT's width

    @property
    def is_modulated_by_text(self) -> bool:
        """Whether a picture's feature depends on the instruction."""
        return self.text_pooling

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = super().problems() + not_positive(self, "vision", "text_pooling_heads")
        if not self.backbone and self.backbone_config is None:
            found.append("vision.backbone must be a hub name or a local folder")
        width = (self.backbone_config or {}).get("hidden_size")
        if self.text_pooling and width and self.text_pooling_heads > 0 and width % self.text_pooling_heads:
            found.append(
                f"vision.text_pooling_heads {self.text_pooling_heads} does not divide the backbone's width {width}"
            )
        return found


@VisionConfig.register_subclass("clip")
@dataclass
class ClipVisionConfig(ViTConfig):
    """A CLIP ViT (arXiv 2103.00020).

    `use_post_layernorm` is off by default because LeRobot reads the CLS token before CLIP's last norm: its
    checkpoints, the only ones in circulation, need that. The original's checkpoints (timm) need it on.
    """

    image_mean: tuple[float, float, float] = CLIP_MEAN  # taken off pixels in [0, 1], by red, green, blue
    image_std: tuple[float, float, float] = CLIP_STD  # that they are divided by
    backbone: str = "openai/clip-vit-base-patch16"  # name on the Hugging Face hub, or a local folder with weights
    use_post_layernorm: bool = False  # CLIP's last norm on the CLS token; the original's checkpoints need it

    def input_problems(self, image_shape: tuple[int, int], camera: str) -> list[str]:
        """What a camera's pictures of (H, W) contradict here, a sentence each."""
        size = (self.backbone_config or {}).get("image_size")
        found = super().input_problems(image_shape, camera)
        return found + (self.size_problems(self.input_shape(image_shape), size, f" of {camera}") if size else [])

    @staticmethod
    def size_problems(shape: tuple[int, int], size: int, source: str = "") -> list[str]:
        """What speaks against pictures of shape (H, W) for a backbone whose learned positions are for size x size."""
        if shape == (size, size):
            return []
        return [
            f"this CLIP backbone takes pictures of {size}x{size}, it would get {shape[0]}x{shape[1]}{source}; "
            f"set vision.crop_shape=[{size},{size}]"
        ]


@VisionConfig.register_subclass("dinov3")
@dataclass
class DinoV3VisionConfig(ViTConfig):
    """A DINOv3 ViT (arXiv 2508.10104), its CLS token after the last norm. Its rotary positions take any picture
    whose sides are multiples of the patch.
    """

    image_mean: tuple[float, float, float] = IMAGENET_MEAN  # taken off pixels in [0, 1], by red, green, blue
    image_std: tuple[float, float, float] = IMAGENET_STD  # that they are divided by
    backbone: str = "facebook/dinov3-vitb16-pretrain-lvd1689m"  # name on the hub (ask for access there), or a folder

    def input_problems(self, image_shape: tuple[int, int], camera: str) -> list[str]:
        """What a camera's pictures of (H, W) contradict here, a sentence each."""
        patch = (self.backbone_config or {}).get("patch_size")
        found = super().input_problems(image_shape, camera)
        return found + (self.size_problems(self.input_shape(image_shape), patch, f" of {camera}") if patch else [])

    @staticmethod
    def size_problems(shape: tuple[int, int], patch: int, source: str = "") -> list[str]:
        """What speaks against pictures of shape (H, W) for patches of that many pixels: a rest would not be seen."""
        if shape[0] % patch == shape[1] % patch == 0:
            return []
        return [
            f"a DINOv3 of {patch}x{patch} patches takes pictures whose sides are multiples of {patch}, it would "
            f"get {shape[0]}x{shape[1]}{source}; set vision.crop_shape"
        ]


@VisionConfig.register_subclass("resnet")
@dataclass
class ResNetConfig(VisionConfig):
    """A convolutional encoder with GroupNorm and spatial soft-argmax keypoints, trained from scratch.

    The stem is one convolution (`stem_channels`, `stem_kernel`, `stem_stride`). Each entry of `widths` is a
    stage: a 3x3 convolution to that width (stride 2 but for the first stage), then `blocks_per_stage`
    residual blocks. With `film`, the text feature scales and shifts the channels of every stage, so that the
    words reach the pixels. The defaults see colours and positions in 64-pixel pictures and train on two CPU
    cores in minutes; a deeper net is `widths=[64,128,256] blocks_per_stage=2`.
    """

    resize_shape: tuple[int, int] | None = (64, 64)  # (H, W) that pictures are scaled to; null: as recorded
    random_shift: int = 3  # pixels; the window is shifted by up to that while training, edges replicated
    stem_channels: int = 32  # of the first convolution
    stem_kernel: int = 6  # its width in pixels, at least stem_stride
    stem_stride: int = 4  # pixels from one of its windows to the next
    widths: tuple[int, ...] = (48,)  # channels of each stage; every stage but the first halves the map
    blocks_per_stage: int = 0  # residual blocks behind each stage's convolution
    num_keypoints: int = 32  # each an (x, y) in the picture: what the transformer is told
    film: bool = True  # the instruction scales and shifts the channels of every stage
    norm_groups: int = 8  # of GroupNorm; must divide stem_channels and every width

    @property
    def is_modulated_by_text(self) -> bool:
        """Whether a picture's feature depends on the instruction."""
        return self.film

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = super().problems()
        if not self.widths:
            found.append("vision.widths must name at least one stage, e.g. [48]")
        found += not_positive(self, "vision", "stem_channels", "stem_stride", "num_keypoints", "norm_groups")
        if self.stem_kernel < self.stem_stride:
            found.append(
                f"vision.stem_kernel {self.stem_kernel} is smaller than vision.stem_stride {self.stem_stride}: "
                "pixels between the windows would not be seen"
            )
        if self.norm_groups > 0:
            for channels in (self.stem_channels, *self.widths):
                if channels < 1 or channels % self.norm_groups:
                    found.append(
                        f"vision: {channels} channels do not divide into norm_groups {self.norm_groups} groups"
                    )
        if self.blocks_per_stage < 0:
            found.append(f"vision.blocks_per_stage must be at least 0, got {self.blocks_per_stage}")
        return found


def exceeds(shape: tuple[int, int], bound: tuple[int, int]) -> bool:
    """Whether an (H, W) is larger than another in any direction."""
    return shape[0] > bound[0] or shape[1] > bound[1]
