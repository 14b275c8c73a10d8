"""What a policy is: every choice that shapes the model, its training objective and its sampler, as draccus dataclasses.

A configuration may be written as YAML or given as `--policy.objective.type=flow_matching`; one that contradicts
itself cannot be made, and the error reports all of its contradictions. The same dataclasses are the checkpoint's
config.json.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import draccus

from .contradictions import ConfigurationError, not_finite, not_positive, unknown_choices
from .objective_configuration import DiffusionConfig, FlowMatchingConfig, ObjectiveConfig
from .vision_configuration import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClipVisionConfig,
    DinoV3VisionConfig,
    ResNetConfig,
    VisionConfig,
    ViTConfig,
)

STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
ACTION = "action"
TASK = "task"
ACTION_IS_PAD = "action_is_pad"

# The whole of a policy's configuration is to be had from here, whichever file a part of it stands in.
__all__ = [
    "ACTION",
    "ACTION_IS_PAD",
    "CLIP_MEAN",
    "CLIP_STD",
    "ENVIRONMENT_STATE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "STATE",
    "TASK",
    "ClipTextConfig",
    "ClipVisionConfig",
    "ConfigurationError",
    "DiffusionConfig",
    "DinoV3VisionConfig",
    "Feature",
    "FlowMatchingConfig",
    "NoTextConfig",
    "NormalizationMode",
    "ObjectiveConfig",
    "ObservationEncoderConfig",
    "PolicyConfig",
    "ResNetConfig",
    "TextConfig",
    "TransformerConfig",
    "ViTConfig",
    "VisionConfig",
]


# Named, because --help loses the comment of a field whose annotation has quotes in it.
FeatureType = Literal["VISUAL", "STATE", "ENV", "ACTION"]
ActionMode = Literal["absolute", "relative"]
NormalizationMode = Literal["MEAN_STD", "MIN_MAX", "IDENTITY"]


@dataclass
class Feature:
    """One entry of the policy's inputs or outputs. Shapes: VISUAL (3, H, W) as recorded, the others (N,).

    STATE is the robot's (`observation.state`), ENV what is known of its surroundings without a camera
    (`observation.environment_state`).
    """

    type: FeatureType  # what it is
    shape: tuple[int, ...]  # (3, H, W) as recorded, or (N,)


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

    model: str = "openai/clip-vit-base-patch16"  # name on the Hugging Face hub, or a local folder with the tokenizer
    model_config: dict[str, Any] | None = None  # a tower with random weights instead, for checkpoints


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

    hidden_dim: int = 512  # width of a step's token, and of the instruction's feature
    num_layers: int = 6  # 4 for small datasets, 8 for large ones
    num_heads: int = 8  # of attention; must divide hidden_dim
    dropout: float = 0.1  # of the attention, while training
    use_positional_encoding: bool = False  # a learned vector a step instead of use_rope
    timestep_embed_dim: int = 256  # width of what is told of the denoising timestep
    use_rope: bool = True  # rotary positions of the chunk's steps
    rope_base: float = 10000.0  # their longest wavelength

    def problems(self) -> list[str]:
        """What contradicts itself here, a sentence each."""
        found = not_finite(self, "transformer")
        found += not_positive(self, "transformer", "hidden_dim", "num_layers", "num_heads", "rope_base")
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

    n_obs_steps: int = 2  # observations the policy sees, the newest and those before it, one a tick of the fps
    horizon: int = 32  # steps of a chunk, of which n_obs_steps - 1 lie in the past
    n_action_steps: int = 24  # steps executed before the next chunk takes over
    action_mode: ActionMode = "absolute"  # relative: differences to the newest state's joints are predicted
    action_state_indices: list[int] | None = None  # where each action's joint stands in the state; training fills it in
    tasks: list[str] = field(default_factory=list)  # the instructions trained on; training fills them in
    input_features: dict[str, Feature] = field(default_factory=dict)  # what it sees, by key; training fills them in
    output_features: dict[str, Feature] = field(default_factory=dict)  # the action; training fills it in
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_default_normalization)  # by kind
    normalized_constant: float = 0.0  # what MIN_MAX makes of a dimension that never changed; -1 is LeRobot's
    observation_encoder: ObservationEncoderConfig = field(default_factory=ObservationEncoderConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    objective: ObjectiveConfig = field(default_factory=DiffusionConfig)
    do_mask_loss_for_padding: bool = True  # steps beyond an episode's end are not learnt
    state_noise: float = 0.0  # standard deviation of noise added to the normalised state while training
    instruction_dropout: float = 0.0  # share of samples trained without their instruction; guidance_scale needs some
    guidance_scale: float = 1.0  # above 1 exaggerates what the instruction changes, when it runs
    max_delay: int = 0  # the most steps given as decided already while training; for joining "prefix" when it runs

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
            *unknown_choices(self, "policy"),
            *not_finite(self, "policy"),
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
        found = not_positive(self, "policy", "n_obs_steps", "horizon", "n_action_steps")
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
            found += unknown_choices(feature, f"feature {key}")
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
