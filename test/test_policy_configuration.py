"""The configuration: contradictions reported together, command line, and the way to JSON and back."""

import json
import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import get_type_hints

import draccus
import pytest
from draccus.wrappers.docstring import get_attribute_docstring
from policy_fixtures import demo_config

from dit_policy_ros.policy.configuration import (
    ClipVisionConfig,
    ConfigurationError,
    DiffusionConfig,
    DinoV3VisionConfig,
    Feature,
    FlowMatchingConfig,
    NoTextConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    ResNetConfig,
    TransformerConfig,
)


def with_vision(vision):
    return {"observation_encoder": ObservationEncoderConfig(vision)}


@dataclass
class Training:
    """Stands for the training command's configuration, which holds a policy's."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    steps: int = 1


def test_defaults_with_features_are_consistent():
    config = demo_config("unused")
    config.validate()
    PolicyConfig(input_features=config.input_features, output_features=config.output_features).validate()
    assert list(config.cameras) == ["observation.images.workspace", "observation.images.wrist"]
    assert config.max_action_steps == 16


def test_all_contradictions_are_reported_at_once_when_it_is_made():
    with pytest.raises(ConfigurationError) as caught:
        demo_config(
            "unused",
            n_obs_steps=2,
            n_action_steps=16,
            action_state_indices=[0, 1],
            state_noise=-1.0,
            max_delay=15,
            guidance_scale=1.5,
            transformer=TransformerConfig(hidden_dim=100, num_heads=3, use_rope=True, use_positional_encoding=True),
            observation_encoder=ObservationEncoderConfig(ResNetConfig(crop_shape=(80, 64), norm_groups=5)),
            objective=DiffusionConfig(denoising_steps=101),
        )
    for part in (
        "n_action_steps 16 exceeds horizon - n_obs_steps + 1 = 15",
        "action_state_indices [0, 1] must hold 7",
        "state_noise must be at least 0",
        "max_delay must be at least 0 and below horizon - n_obs_steps + 1 = 15, got 15",
        "guidance_scale 1.5 needs instruction_dropout above 0",
        "hidden_dim 100 does not divide into transformer.num_heads 3",
        "use_rope and transformer.use_positional_encoding exclude each other",
        "crop_shape (80, 64) does not fit into vision.resize_shape (64, 64)",
        "32 channels do not divide into norm_groups 5",
        "denoising_steps must be 1 to 100, got 101",
    ):
        assert part in str(caught.value), part


def test_features_may_come_later_and_are_then_needed():
    config = PolicyConfig()  # of the command line: training fills the features in from its dataset
    with pytest.raises(
        ConfigurationError, match=r"no input feature is given(.|\n)*type ACTION, named action, is needed"
    ):
        config.validate()
    with pytest.raises(ConfigurationError, match="n_action_steps 32 exceeds"):
        PolicyConfig(n_action_steps=32)


def test_features_of_one_side_are_checked_as_soon_as_they_are_given():
    """Training fills in the other side from its dataset; what is wrong already need not wait for that."""
    with pytest.raises(ConfigurationError, match=r"feature observation.state: a STATE has shape \(N,\), got \(0,\)"):
        PolicyConfig(input_features={"observation.state": Feature("STATE", (0,))})
    with pytest.raises(ConfigurationError, match=r"STATE must be named observation.state"):
        PolicyConfig(input_features={"observation.joints": Feature("STATE", (7,))})
    with pytest.raises(ConfigurationError, match=r"crop_shape \(224, 224\) does not fit into observation.images.wrist"):
        PolicyConfig(input_features=CAMERAS, **with_vision(ClipVisionConfig(resize_shape=None)))
    with pytest.raises(ConfigurationError, match=r"action_state_indices \[7\] must hold 1 indices .* below 7"):
        PolicyConfig(input_features=STATE, action_mode="relative", action_state_indices=[7])
    with pytest.raises(ConfigurationError, match="exactly one output feature of type ACTION") as caught:
        PolicyConfig(output_features={"arm": Feature("ACTION", (7,))})
    assert "no input feature" not in str(caught.value)
    PolicyConfig(input_features=STATE, action_mode="relative", action_state_indices=[6])
    PolicyConfig(output_features={"action": Feature("ACTION", (7,))})


def test_no_contradiction_of_the_features_hides_another():
    with pytest.raises(ConfigurationError) as caught:
        demo_config(
            "unused",
            normalization_mapping={"VISUAL": "MIN_MAX", "STATE": "MINMAX"},
            action_state_indices=[0],
            input_features=STATE | {"observation.images.wrist": Feature("VISUAL", (3, 48, 64))},
            observation_encoder=ObservationEncoderConfig(
                ResNetConfig(resize_shape=None, crop_shape=(50, 50), film=True), NoTextConfig()
            ),
        )
    for part in (
        "normalization_mapping.VISUAL must be MEAN_STD",
        "normalization_mapping.STATE must be one of MEAN_STD, MIN_MAX, IDENTITY; got 'MINMAX'",
        "normalization_mapping lacks ACTION",
        "action_state_indices [0] must hold 7",
        "crop_shape (50, 50) does not fit into observation.images.wrist",
        "the instruction cannot modulate vision",
    ):
        assert part in str(caught.value), part
    with pytest.raises(ConfigurationError) as caught:
        demo_config(
            "unused",
            input_features={"observation.images.wrist": Feature("VISUAL", (3,)), "joints": Feature("STATE", (0,))},
            output_features={"arm": Feature("ACTION", (7,))},
        )
    for part in (
        "feature observation.images.wrist: a VISUAL has shape (3, H, W), got (3,)",
        "feature joints: a STATE has shape (N,), got (0,)",
        "STATE must be named observation.state",
        "exactly one output feature of type ACTION",
    ):
        assert part in str(caught.value), part
    # A shape without a height is said in a sentence also where the words are checked against the cameras.
    with pytest.raises(ConfigurationError, match=r"has shape \(3, H, W\), got \(3,\)"):
        PolicyConfig(
            input_features={"observation.images.wrist": Feature("VISUAL", (3,))},
            observation_encoder=ObservationEncoderConfig(ResNetConfig(), NoTextConfig()),
        )


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda number: {"state_noise": number}, "policy.state_noise"),
        (lambda number: {"guidance_scale": number, "instruction_dropout": 0.1}, "policy.guidance_scale"),
        (lambda number: {"normalized_constant": number}, "policy.normalized_constant"),
        (lambda number: {"objective": FlowMatchingConfig(timestep_scale=number)}, "objective.timestep_scale"),
        (lambda number: {"objective": FlowMatchingConfig(beta_alpha=number)}, "objective.beta_alpha"),
        (lambda number: {"objective": DiffusionConfig(clip_range=number)}, "objective.clip_range"),
        (lambda number: {"transformer": TransformerConfig(rope_base=number)}, "transformer.rope_base"),
        (lambda number: with_vision(ResNetConfig(image_mean=(0.5, number, 0.5))), "vision.image_mean"),
        (lambda number: with_vision(ResNetConfig(image_std=(number, 0.5, 0.5))), "vision.image_std"),
        (lambda number: with_vision(ResNetConfig(lr_multiplier=number)), "vision.lr_multiplier"),
    ],
)
def test_a_number_that_is_none_is_refused(make, name, number):
    with pytest.raises(ConfigurationError, match=f"{name} must be finite, got .*{number}"):
        PolicyConfig(**make(number))


def test_the_command_line_is_told_in_one_error():
    arguments = ["--policy.n_action_steps=99", "--policy.objective.denoising_steps=0"]
    with pytest.raises(draccus.utils.ParsingError) as caught:
        draccus.parse(Training, args=arguments)
    reason = str(caught.value.__cause__ or caught.value)
    assert "n_action_steps 99 exceeds horizon - n_obs_steps + 1 = 31" in reason
    assert "objective.denoising_steps must be 1 to 100, got 0" in reason


CAMERAS = {f"observation.images.{name}": Feature("VISUAL", (3, 48, 64)) for name in ("workspace", "wrist")}
STATE = {"observation.state": Feature("STATE", (7,))}
ENVIRONMENT = {"observation.environment_state": Feature("ENV", (5,))}
WITHOUT_WORDS = ObservationEncoderConfig(ResNetConfig(film=False), NoTextConfig())


@pytest.mark.parametrize("inputs", [CAMERAS, STATE, ENVIRONMENT, ENVIRONMENT | CAMERAS, STATE | ENVIRONMENT | CAMERAS])
@pytest.mark.parametrize("encoders", [ObservationEncoderConfig(ResNetConfig()), WITHOUT_WORDS])
def test_any_inputs_will_do(inputs, encoders):
    changes = {"input_features": inputs, "observation_encoder": encoders, "action_mode": "absolute"}
    config = demo_config("unused", **changes)
    assert config.state_dim == (7 if "observation.state" in inputs else 0)
    assert config.environment_state_dim == (5 if "observation.environment_state" in inputs else 0)
    assert config.environment_state_mode == "MIN_MAX"
    changes["normalization_mapping"] = config.normalization_mapping | {"ENV": "IDENTITY"}
    assert demo_config("unused", **changes).environment_state_mode == "IDENTITY"


def test_a_language_free_policy_cannot_be_modulated_by_words():
    for vision in (ResNetConfig(), ClipVisionConfig(text_pooling=True)):
        with pytest.raises(ConfigurationError, match="the instruction cannot modulate vision"):
            demo_config("unused", observation_encoder=ObservationEncoderConfig(vision, NoTextConfig()))
    with pytest.raises(ConfigurationError, match="instruction_dropout has nothing to drop"):
        demo_config("unused", observation_encoder=WITHOUT_WORDS, instruction_dropout=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": TransformerConfig(hidden_dim=36, num_heads=4)}, "even width of a head, got 9"),
        ({"action_state_indices": None}, "relative needs action_state_indices"),
        ({"action_state_indices": [0, 1, 2, 3, 4, 5, 7]}, "below 7"),
        ({"output_features": {}}, "exactly one output feature of type ACTION"),
        ({"input_features": {}}, "no input feature is given"),
        ({"input_features": CAMERAS}, "relative needs observation.state"),
        ({"input_features": {"observation.joints": Feature("STATE", (7,))}}, "STATE must be named observation.state"),
        ({"input_features": {"observation.state": Feature("ENV", (7,))}}, "STATE must be named observation.state"),
        ({"input_features": STATE | {"action": Feature("ACTION", (7,))}}, "an action is no input feature"),
        ({"normalization_mapping": {"ACTION": "MIN_MAX", "STATE": "MIN_MAX"}}, "lacks VISUAL"),
        ({"output_features": {"action": Feature("ACTION", (7, 2))}}, r"has shape \(N,\), got \(7, 2\)"),
        ({"normalization_mapping": {"VISUAL": "MIN_MAX", "STATE": "MIN_MAX"}}, "lacks ACTION"),
        ({"normalization_mapping": {"VISUAL": "MIN_MAX", "STATE": "MIN_MAX"}}, "VISUAL must be MEAN_STD"),
        ({"objective": FlowMatchingConfig(sigma_min=1.0)}, r"sigma_min must be in \[0, 1\)"),
        ({"objective": FlowMatchingConfig(noise_draws=0)}, "noise_draws must be positive"),
        ({"objective": FlowMatchingConfig(denoising_steps=0)}, "denoising_steps must be 1 to"),
        (
            {"observation_encoder": ObservationEncoderConfig(ClipVisionConfig(resize_shape=None))},
            r"crop_shape \(224, 224\) does not fit into observation.images.workspace of \(128, 128\)",
        ),
        ({"n_obs_steps": 0}, "n_obs_steps must be positive"),
        ({"max_delay": -1}, "max_delay must be at least 0"),
        ({"instruction_dropout": 1.0}, r"instruction_dropout must be in \[0, 1\), got 1.0"),
        ({"instruction_dropout": 0.1, "guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ({"action_mode": "delta"}, "action_mode must be one of absolute, relative; got 'delta'"),
        ({"objective": FlowMatchingConfig(sampler="ddim")}, "sampler must be one of euler, heun, rk4; got 'ddim'"),
        ({"objective": DiffusionConfig(sampler="rk4")}, r"must be one of ddpm, ddim, dpm_solver\+\+; got 'rk4'"),
        ({"objective": DiffusionConfig(prediction_type="x")}, "prediction_type must be one of epsilon"),
        ({"objective": FlowMatchingConfig(timestep_scale=0.0)}, "timestep_scale must be positive"),
        (with_vision(ResNetConfig(resize_mode="squeeze")), "resize_mode must be one of cover, stretch"),
        (with_vision(ResNetConfig(resize_mode="stretch", resize_shape=None)), "stretch needs vision.resize_shape"),
        (with_vision(ClipVisionConfig(backbone="")), "backbone must be a hub name"),
        (with_vision(ClipVisionConfig(text_pooling=True, text_pooling_heads=0)), "text_pooling_heads must be positive"),
        (
            with_vision(ClipVisionConfig(backbone_config={"hidden_size": 20}, text_pooling=True)),
            "text_pooling_heads 8 does not divide the backbone's width 20",
        ),
        (
            with_vision(ClipVisionConfig(backbone_config={"image_size": 32}, crop_shape=(32, 30))),
            "takes pictures of 32x32, it would get 32x30 of observation.images.workspace",
        ),
        (
            with_vision(DinoV3VisionConfig(backbone_config={"patch_size": 16}, crop_shape=(64, 40))),
            "sides are multiples of 16, it would get 64x40 of observation.images.wrist",
        ),
    ],
)
def test_contradiction(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        demo_config("unused", **changes).validate()


def test_command_line_reaches_every_level():
    arguments = [
        "--policy.observation_encoder.vision.type=resnet",
        "--policy.observation_encoder.vision.resize_shape=[96,64]",
        "--policy.observation_encoder.vision.widths=[64,128]",
        "--policy.observation_encoder.text.model=outputs/tiny_clip",
        "--policy.objective.type=flow_matching",
        "--policy.objective.timestep_sampling=uniform",
        "--policy.transformer.num_layers=3",
        "--policy.action_mode=relative",
        "--policy.action_state_indices=[0,1]",
    ]
    policy = draccus.parse(Training, args=arguments).policy
    vision = policy.observation_encoder.vision
    assert isinstance(vision, ResNetConfig)
    assert (vision.resize_shape, vision.widths, vision.num_keypoints) == ((96, 64), (64, 128), 32)
    assert policy.observation_encoder.text.model == "outputs/tiny_clip"
    assert policy.objective == FlowMatchingConfig(timestep_sampling="uniform")
    assert policy.transformer == TransformerConfig(num_layers=3)
    assert (policy.action_mode, policy.action_state_indices) == ("relative", [0, 1])


def test_unknown_names_and_values_are_refused():
    for content in (
        {"horizont": 3},
        {"objective": {"type": "flow"}},
        {"objective": {"type": "diffusion", "sampler": "dpm"}},
        {"transformer": {"num_layers": 2.5}},
        {"input_features": {"x": {"type": "SOUND", "shape": [3]}}},
    ):
        with pytest.raises((draccus.utils.DecodingError, draccus.utils.ParsingError)):
            draccus.decode(PolicyConfig, content)


def test_json_and_back_is_the_same_configuration_in_the_same_order():
    for config in (
        demo_config("here", tasks=["one", "two"]),
        PolicyConfig(
            observation_encoder=ObservationEncoderConfig(ClipVisionConfig(backbone_config={"hidden_size": 8})),
            objective=DiffusionConfig(clip_range=None, prediction_type="sample"),
        ),
    ):
        encoded = json.loads(json.dumps(draccus.encode(config)))
        restored = draccus.decode(PolicyConfig, encoded)
        assert restored == config
        assert list(restored.input_features) == list(config.input_features)
        assert encoded["objective"]["type"] in ("flow_matching", "diffusion")


def kinds_of_options(kind):
    """A dataclass, and those it is made of, each type of a choice among them."""
    kinds = kind.get_known_choices().values() if issubclass(kind, draccus.ChoiceRegistry) else [kind]
    for each in kinds:
        yield each
        for inner in get_type_hints(each).values():
            if is_dataclass(inner) or (isinstance(inner, type) and issubclass(inner, draccus.ChoiceRegistry)):
                yield from kinds_of_options(inner)


def test_help_explains_every_option():
    """As draccus reads the comments: it loses that of a field whose annotation has quotes in it."""
    kinds = list(kinds_of_options(PolicyConfig))
    assert {ResNetConfig, DiffusionConfig, FlowMatchingConfig, TransformerConfig} <= set(kinds)
    without = [
        f"{kind.__name__}.{each.name}"
        for kind in [*kinds, Feature]
        for each in fields(kind)
        # Of a group the help prints its docstring.
        if not is_dataclass(get_type_hints(kind)[each.name])
        and not get_attribute_docstring(kind, each.name).comment_inline
    ]
    assert not without
