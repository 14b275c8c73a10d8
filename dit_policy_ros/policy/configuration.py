"""What a policy is: every choice that shapes the model, its training objective and its sampler, as draccus dataclasses.

A configuration may be written as YAML or given as `--policy.objective.type=flow_matching`; one that contradicts
itself cannot be made, and the error reports all of its contradictions. The same dataclasses are the checkpoint's
config.json.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import draccus

STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
ACTION = "action"
TASK = "task"
ACTION_IS_PAD = "action_is_pad"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ConfigurationError(ValueError):
    """A configuration that contradicts itself; the message lists every contradiction."""


@dataclass
class Feature:
    """One entry of the policy's inputs or outputs. Shapes: VISUAL (3, H, W) as recorded, the others (N,).

    STATE is the robot's (`observation.state`), ENV what is known of its surroundings without a camera
    (`observation.environment_state`).
    """

    type: Literal["VISUAL", "STATE", "ENV", "ACTION"]
    shape: tuple[int, ...]


@dataclass
class VisionConfig(draccus.ChoiceRegistry):
    """What is common to the vision encoders: from the camera's picture to the encoder's input.

    The picture is scaled, keeping its aspect ratio, until it just covers `resize_shape` (`resize_mode`
    "stretch", for LeRobot's checkpoints, scales it to exactly that shape instead), then cut to `crop_shape`
    (default: `resize_shape`): at the centre at inference, anywhere at training if `crop_is_random`. Training may
    also shift the window by up to `random_shift` pixels, edges replicated (DrQ-v2, arXiv 2107.09645). Shapes are
    (H, W).
    """

    resize_shape: tuple[int, int] | None = None
    resize_mode: Literal["cover", "stretch"] = "cover"
    crop_shape: tuple[int, int] | None = None
    crop_is_random: bool = True
    random_shift: int = 0
    use_separate_encoder_per_camera: bool = False
    lr_multiplier: float = 1.0
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

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
        found = _unknown_choices(self, "vision") + _not_finite(self, "vision")
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
        if self.lr_multiplier < 0:
            found.append(f"vision.lr_multiplier must be at least 0, got {self.lr_multiplier}")
        if min(self.image_std) <= 0:
            found.append(f"vision.image_std must be positive, got {self.image_std}")
        return found

    def input_problems(self, image_shape: tuple[int, int], camera: str) -> list[str]:
        """What a camera's pictures of (H, W) contradict here, a sentence each."""
        if self.crop_shape and not self.resize_shape and exceeds(self.crop_shape, image_shape):
            return [f"vision.crop_shape {self.crop_shape} does not fit into {camera} of {image_shape}"]
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

    resize_shape: tuple[int, int] | None = (256, 256)
    crop_shape: tuple[int, int] | None = (224, 224)
    lr_multiplier: float = 0.1
    backbone: str = ""
    backbone_config: dict[str, Any] | None = None
    text_pooling: bool = False
    text_pooling_heads: int = 8

    @property
    def is_modulated_by_text(self) -> bool:
        """Whether a picture's feature depends on the instruction."""
        return self.text_pooling

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = super().problems() + _not_positive(self, "vision", "text_pooling_heads")
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

    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    backbone: str = "openai/clip-vit-base-patch16"
    use_post_layernorm: bool = False

    def input_problems(self, image_shape: tuple[int, int], camera: str) -> list[str]:
        """What a camera's pictures of (H, W) contradict here, a sentence each."""
        shape, size = self.input_shape(image_shape), (self.backbone_config or {}).get("image_size")
        found = super().input_problems(image_shape, camera)
        if size and shape != (size, size):
            found.append(
                f"this CLIP backbone takes pictures of {size}x{size}, it would get {shape[0]}x{shape[1]} of {camera}; "
                f"set vision.crop_shape=[{size},{size}]"
            )
        return found


@VisionConfig.register_subclass("dinov3")
@dataclass
class DinoV3VisionConfig(ViTConfig):
    """A DINOv3 ViT (arXiv 2508.10104), its CLS token after the last norm. Its rotary positions take any picture
    whose sides are multiples of the patch.
    """

    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    backbone: str = "facebook/dinov3-vitb16-pretrain-lvd1689m"

    def input_problems(self, image_shape: tuple[int, int], camera: str) -> list[str]:
        """What a camera's pictures of (H, W) contradict here, a sentence each."""
        shape, patch = self.input_shape(image_shape), (self.backbone_config or {}).get("patch_size")
        found = super().input_problems(image_shape, camera)
        if patch and (shape[0] % patch or shape[1] % patch):
            found.append(
                f"a DINOv3 of {patch}x{patch} patches takes pictures whose sides are multiples of {patch}, it would "
                f"get {shape[0]}x{shape[1]} of {camera}; set vision.crop_shape"
            )
        return found


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

    resize_shape: tuple[int, int] | None = (64, 64)
    random_shift: int = 3
    stem_channels: int = 32
    stem_kernel: int = 6
    stem_stride: int = 4
    widths: tuple[int, ...] = (48,)
    blocks_per_stage: int = 0
    num_keypoints: int = 32
    film: bool = True
    norm_groups: int = 8

    @property
    def is_modulated_by_text(self) -> bool:
        """Whether a picture's feature depends on the instruction."""
        return self.film

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = super().problems()
        if not self.widths:
            found.append("vision.widths must name at least one stage, e.g. [48]")
        found += _not_positive(self, "vision", "stem_channels", "stem_stride", "num_keypoints", "norm_groups")
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


@dataclass
class TextConfig(draccus.ChoiceRegistry):
    """How the instruction becomes a vector of the transformer's width."""

    @classmethod
    def default_choice_name(cls) -> str:
        """The type meant where a configuration names none."""
        return "clip"


@TextConfig.register_subclass("clip")
@dataclass
class ClipTextConfig(TextConfig):
    """A frozen CLIP text tower's pooled output with a trained projection.

    `model` is a hub name or a local folder with weights and tokenizer. `model_config` (the fields of
    transformers' CLIPTextConfig) is for checkpoints, as `backbone_config` of the vision encoder; the
    tokenizer must then be given.
    """

    model: str = "openai/clip-vit-base-patch16"
    model_config: dict[str, Any] | None = None


@TextConfig.register_subclass("none")
@dataclass
class NoTextConfig(TextConfig):
    """No instruction: a policy of one task."""


@dataclass
class ObservationEncoderConfig:
    """The two encoders of the conditioning."""

    vision: VisionConfig = field(default_factory=ClipVisionConfig)
    text: TextConfig = field(default_factory=ClipTextConfig)


@dataclass
class TransformerConfig:
    """The diffusion transformer. Positions come from RoPE, or from a learned embedding, or (neither) not at all."""

    hidden_dim: int = 512
    num_layers: int = 6
    num_heads: int = 8
    dropout: float = 0.1
    use_positional_encoding: bool = False
    timestep_embed_dim: int = 256
    use_rope: bool = True
    rope_base: float = 10000.0

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = _not_finite(self, "transformer")
        found += _not_positive(self, "transformer", "hidden_dim", "num_layers", "num_heads", "rope_base")
        if self.num_heads > 0 and self.hidden_dim % self.num_heads:
            found.append(
                f"transformer.hidden_dim {self.hidden_dim} does not divide into transformer.num_heads "
                f"{self.num_heads} heads"
            )
        elif self.num_heads > 0 and self.use_rope and self.hidden_dim // self.num_heads % 2:
            found.append(
                f"transformer.use_rope needs an even width of a head, got {self.hidden_dim // self.num_heads} "
                "(hidden_dim / num_heads)"
            )
        if self.use_rope and self.use_positional_encoding:
            found.append("transformer.use_rope and transformer.use_positional_encoding exclude each other")
        if self.timestep_embed_dim < 4 or self.timestep_embed_dim % 2:
            found.append(f"transformer.timestep_embed_dim must be even and at least 4, got {self.timestep_embed_dim}")
        if not 0 <= self.dropout < 1:
            found.append(f"transformer.dropout must be in [0, 1), got {self.dropout}")
        return found


@dataclass
class ObjectiveConfig(draccus.ChoiceRegistry):
    """What is common to the objectives.

    `denoising_steps` is the default at inference and may be changed for each call. `noise_draws` is the
    number of noise samples (and timesteps) an observation is trained on at once: its conditioning, the
    expensive part, is encoded once for all of them.
    """

    denoising_steps: int = 10
    noise_draws: int = 1

    @classmethod
    def default_choice_name(cls) -> str:
        """The type meant where a configuration names none."""
        return "diffusion"

    @property
    def max_denoising_steps(self) -> int:
        """The most steps a sampler may take."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = _unknown_choices(self, "objective") + _not_finite(self, "objective")
        found += _not_positive(self, "objective", "noise_draws")
        if not 1 <= self.denoising_steps <= self.max_denoising_steps:
            found.append(
                f"objective.denoising_steps must be 1 to {self.max_denoising_steps}, got {self.denoising_steps}"
            )
        return found


@ObjectiveConfig.register_subclass("diffusion")
@dataclass
class DiffusionConfig(ObjectiveConfig):
    """DDPM (arXiv 2006.11239) with the squared-cosine schedule (arXiv 2102.09672, `squaredcos_cap_v2`).

    `timestep_spacing` "trailing" starts from the last training timestep; "leading", diffusers' default, never
    visits it (arXiv 2305.08891, table 2). `clip_range` bounds the estimate of the clean actions at each step;
    null leaves it free.
    """

    num_train_timesteps: int = 100
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    sampler: Literal["ddpm", "ddim", "dpm_solver++"] = "ddim"
    timestep_spacing: Literal["trailing", "leading"] = "trailing"
    clip_range: float | None = 1.0

    @property
    def max_denoising_steps(self) -> int:
        """One step for each training timestep."""
        return self.num_train_timesteps

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = super().problems() + _not_positive(self, "objective", "num_train_timesteps")
        if self.clip_range is not None and self.clip_range <= 0:
            found.append(f"objective.clip_range must be positive or null, got {self.clip_range}")
        return found


@ObjectiveConfig.register_subclass("flow_matching")
@dataclass
class FlowMatchingConfig(ObjectiveConfig):
    """Conditional flow matching along straight lines (arXiv 2210.02747), t from 0 (noise) to 1 (data).

    Training times are drawn uniformly, or ("beta") as `beta_scale * (1 - Beta(beta_alpha, beta_beta))`, which
    favours noisy times (pi0, arXiv 2410.24164, appendix B). The timestep embedding is given
    `timestep_scale * t`: unscaled, t in [0, 1] moves a sixth of its dimensions (1000 moves them all); 1 is what
    LeRobot's checkpoints need.
    """

    sigma_min: float = 0.0
    sampler: Literal["euler", "heun", "rk4"] = "euler"
    timestep_scale: float = 1.0
    timestep_sampling: Literal["uniform", "beta"] = "beta"
    beta_scale: float = 0.999
    beta_alpha: float = 1.5
    beta_beta: float = 1.0

    @property
    def max_denoising_steps(self) -> int:
        """A bound against typing errors: beyond it, steps are smaller than fp32 resolves in the actions."""
        return 1000

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = super().problems() + _not_positive(self, "objective", "beta_alpha", "beta_beta", "timestep_scale")
        if not 0 <= self.sigma_min < 1:
            found.append(f"objective.sigma_min must be in [0, 1), got {self.sigma_min}")
        if not 0 < self.beta_scale <= 1:
            found.append(f"objective.beta_scale must be in (0, 1], got {self.beta_scale}")
        return found


NormalizationMode = Literal["MEAN_STD", "MIN_MAX", "IDENTITY"]


def _default_normalization() -> dict[str, NormalizationMode]:
    return {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"}


@dataclass
class PolicyConfig:
    """A Multitask DiT policy.

    A policy sees any of its robot's state, its surroundings' state (normalised as the robot's unless
    `normalization_mapping` has a mode for ENV) and cameras, at least one, and reads an instruction unless its text
    encoder is `none`. Its features may be filled in later, as training does from its dataset.

    A chunk has `horizon` steps, of which the first `n_obs_steps - 1` lie in the past; `n_action_steps` of the
    rest are executed before the next chunk takes over. The order of the VISUAL keys of `input_features` is
    the order of the cameras. With `action_mode="relative"` the model predicts differences to the newest
    state's joints, which `action_state_indices` finds in the state, one index an action dimension. `tasks`
    are the instructions trained on. `normalized_constant` is what MIN_MAX makes of a dimension that never changed
    in the data: -1 for LeRobot's and the original's checkpoints. `state_noise` is the standard deviation of noise
    added to the normalised state while training.

    `instruction_dropout` is the share of training samples that see no instruction but a learned vector in its
    place; `guidance_scale` may then exceed 1 at inference (classifier-free guidance, arXiv 2207.12598: prediction
    without + scale * (with - without)). `max_delay` is the largest number of steps that training gives clean, as
    the committed start of the chunk (training-time real-time chunking, arXiv 2512.05964); 0 trains none.
    """

    n_obs_steps: int = 2
    horizon: int = 32
    n_action_steps: int = 24
    action_mode: Literal["absolute", "relative"] = "absolute"
    action_state_indices: list[int] | None = None
    tasks: list[str] = field(default_factory=list)
    input_features: dict[str, Feature] = field(default_factory=dict)
    output_features: dict[str, Feature] = field(default_factory=dict)
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_default_normalization)
    normalized_constant: float = 0.0
    observation_encoder: ObservationEncoderConfig = field(default_factory=ObservationEncoderConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    objective: ObjectiveConfig = field(default_factory=DiffusionConfig)
    do_mask_loss_for_padding: bool = True
    state_noise: float = 0.0
    instruction_dropout: float = 0.0
    guidance_scale: float = 1.0
    max_delay: int = 0

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """(H, W) of each camera's picture by its feature key, in the order of the conditioning."""
        return {
            key: (feature.shape[1], feature.shape[2])
            for key, feature in self.input_features.items()
            if feature.type == "VISUAL"
        }

    @property
    def state_dim(self) -> int:
        """Length of the robot's state vector; 0 for a policy that has none."""
        return self.input_features[STATE].shape[0] if STATE in self.input_features else 0

    @property
    def environment_state_dim(self) -> int:
        """Length of the environment's state vector; 0 for a policy that has none."""
        return self.input_features[ENVIRONMENT_STATE].shape[0] if ENVIRONMENT_STATE in self.input_features else 0

    @property
    def environment_state_mode(self) -> NormalizationMode:
        """How the environment's state is normalised: as the robot's, unless the mapping has a mode for ENV."""
        return self.normalization_mapping.get("ENV") or self.normalization_mapping["STATE"]

    @property
    def action_dim(self) -> int:
        """Length of one action."""
        return self.output_features[ACTION].shape[0]

    @property
    def max_action_steps(self) -> int:
        """How many steps of a chunk do not lie in the past."""
        return self.horizon - self.n_obs_steps + 1

    def __post_init__(self) -> None:
        """Raises ConfigurationError naming every contradiction that shows already, be the features given or not."""
        self._check(is_complete=False)

    def validate(self) -> None:
        """Raises ConfigurationError naming every contradiction at once, features that are still missing included."""
        self._check(is_complete=True)

    def _check(self, is_complete: bool) -> None:
        problems = [
            *_unknown_choices(self, "policy"),
            *_not_finite(self, "policy"),
            *self._step_problems(),
            *self._instruction_problems(),
            *self._feature_problems(is_complete),
            *self.observation_encoder.vision.problems(),
            *self.transformer.problems(),
            *self.objective.problems(),
        ]
        if problems:
            raise ConfigurationError("the policy's configuration contradicts itself:\n  - " + "\n  - ".join(problems))

    def _step_problems(self) -> list[str]:
        found = _not_positive(self, "policy", "n_obs_steps", "horizon", "n_action_steps")
        if self.n_action_steps > self.max_action_steps:
            found.append(
                f"n_action_steps {self.n_action_steps} exceeds horizon - n_obs_steps + 1 = {self.max_action_steps}: "
                "a chunk does not hold that many steps after the newest observation"
            )
        if not 0 <= self.max_delay < max(self.max_action_steps, 1):
            found.append(
                f"max_delay must be at least 0 and below horizon - n_obs_steps + 1 = {self.max_action_steps}, got "
                f"{self.max_delay}: a chunk given clean as a whole leaves nothing to learn"
            )
        if self.state_noise < 0:
            found.append(f"state_noise must be at least 0, got {self.state_noise}")
        return found

    def _instruction_problems(self) -> list[str]:
        found = []
        if not 0 <= self.instruction_dropout < 1:
            found.append(f"instruction_dropout must be in [0, 1), got {self.instruction_dropout}")
        if self.guidance_scale < 0:
            found.append(f"guidance_scale must be at least 0, got {self.guidance_scale}")
        if self.guidance_scale != 1 and self.instruction_dropout == 0:
            found.append(
                f"guidance_scale {self.guidance_scale} needs instruction_dropout above 0: guidance compares with what "
                "the policy does without the instruction, which it must have learned"
            )
        if not isinstance(self.observation_encoder.text, NoTextConfig):
            return found
        if self.instruction_dropout > 0:
            found.append("instruction_dropout has nothing to drop: observation_encoder.text is none")
        if self.observation_encoder.vision.is_modulated_by_text and "VISUAL" in _types(self.input_features):
            found.append(
                "the instruction cannot modulate vision, observation_encoder.text is none: set vision.film=false "
                "(resnet) or vision.text_pooling=false (clip, dinov3)"
            )
        return found

    def _feature_problems(self, is_complete: bool) -> list[str]:
        """What of the features contradicts itself; of those that may be filled in later, only if is_complete."""
        misshapen = self._shape_problems()
        found = list(misshapen)
        if is_complete or self.input_features:
            found += self._input_problems()
        if is_complete or self.output_features:
            found += self._output_problems()
        found += self._normalization_problems()
        if not misshapen:  # these two read sizes
            found += self._camera_problems() + self._relative_action_problems()
        return found

    def _shape_problems(self) -> list[str]:
        found = []
        for key, feature in (self.input_features | self.output_features).items():
            found += _unknown_choices(feature, f"feature {key}")
            wanted = "(3, H, W)" if feature.type == "VISUAL" else "(N,)"
            shape = tuple(feature.shape)
            fits = len(shape) == 3 and shape[0] == 3 if feature.type == "VISUAL" else len(shape) == 1
            if not fits or min(shape, default=0) < 1:
                found.append(f"feature {key}: a {feature.type} has shape {wanted}, got {shape}")
        return found

    def _input_problems(self) -> list[str]:
        if not self.input_features:
            return [f"no input feature is given: a policy needs {STATE}, {ENVIRONMENT_STATE} or a camera"]
        found = []
        for kind, key in (("STATE", STATE), ("ENV", ENVIRONMENT_STATE)):
            named = [name for name, feature in self.input_features.items() if feature.type == kind]
            if named not in ([], [key]) or (not named and key in self.input_features):
                found.append(f"an input feature of type {kind} must be named {key}, and nothing else; got {named}")
        if "ACTION" in _types(self.input_features):
            found.append("an action is no input feature")
        return found

    def _output_problems(self) -> list[str]:
        if [(name, feature.type) for name, feature in self.output_features.items()] == [(ACTION, "ACTION")]:
            return []
        return [
            f"exactly one output feature of type ACTION, named {ACTION}, is needed; got {list(self.output_features)}"
        ]

    def _normalization_problems(self) -> list[str]:
        used = _types(self.input_features | self.output_features)
        modes = self.normalization_mapping
        fallback = {"ENV": "STATE"}
        found = [
            f"normalization_mapping lacks {kind}"
            for kind in ("VISUAL", "STATE", "ENV", "ACTION")
            if kind in used and kind not in modes and fallback.get(kind) not in modes
        ]
        known = get_args(NormalizationMode)
        found += [
            f"normalization_mapping.{kind} must be one of {', '.join(known)}; got {mode!r}"
            for kind, mode in modes.items()
            if mode not in known
        ]
        if modes.get("VISUAL") == "MIN_MAX":
            found.append("normalization_mapping.VISUAL must be MEAN_STD (vision.image_mean, image_std) or IDENTITY")
        return found

    def _camera_problems(self) -> list[str]:
        vision = self.observation_encoder.vision
        return [problem for key, shape in self.cameras.items() for problem in vision.input_problems(shape, key)]

    def _relative_action_problems(self) -> list[str]:
        if self.action_mode == "absolute" or not self.input_features:
            return []
        indices = self.action_state_indices
        if not self.state_dim:
            return [f"action_mode relative needs {STATE}: actions are differences to its joints"]
        if indices is None:
            return ["action_mode relative needs action_state_indices: where each action's joint stands in the state"]
        dim = self.action_dim if ACTION in self.output_features else len(indices)
        if len(indices) != dim or not all(0 <= index < self.state_dim for index in indices):
            return [
                f"action_state_indices {indices} must hold {dim} indices (one an action dimension) "
                f"below {self.state_dim} (the state's length)"
            ]
        return []


def _types(features: dict[str, Feature]) -> set[str]:
    return {feature.type for feature in features.values()}


def exceeds(shape: tuple[int, int], bound: tuple[int, int]) -> bool:
    """Whether an (H, W) is larger than another in any direction."""
    return shape[0] > bound[0] or shape[1] > bound[1]


def _unknown_choices(config: Any, where: str) -> list[str]:
    """Fields of which only certain words are allowed, and that hold another."""
    return [
        f"{where}.{name} must be one of {', '.join(get_args(kind))}; got {getattr(config, name)!r}"
        for name, kind in get_type_hints(type(config)).items()
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind)
    ]


def _not_positive(config: Any, where: str, *names: str) -> list[str]:
    return [
        f"{where}.{name} must be positive, got {getattr(config, name)}" for name in names if getattr(config, name) <= 0
    ]


def _not_finite(config: Any, where: str) -> list[str]:
    """Fields that hold a number, or several, of which one is infinite or none at all: NaN passes any comparison."""
    return [
        f"{where}.{name} must be finite, got {value}"
        for name, value in vars(config).items()
        if not all(math.isfinite(number) for number in _floats(value))
    ]


def _floats(value: Any) -> list[float]:
    return [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, float)]
