"""The configuration: contradictions reported together, command line, and the way to JSON and back."""

import json
from dataclasses import dataclass, field

import draccus
import pytest
from policy_fixtures import demo_config

from dit_policy_ros.policy.configuration import (
    ClipVisionConfig,
    ConfigurationError,
    DiffusionConfig,
    Feature,
    FlowMatchingConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    ResNetConfig,
    TransformerConfig,
)


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


def test_all_contradictions_are_reported_at_once():
    config = demo_config(
        "unused",
        n_obs_steps=2,
        n_action_steps=16,
        action_state_indices=[0, 1],
        state_noise=-1.0,
        transformer=TransformerConfig(hidden_dim=100, num_heads=3, use_rope=True, use_positional_encoding=True),
        observation_encoder=ObservationEncoderConfig(ResNetConfig(crop_shape=(80, 64), norm_groups=5)),
        objective=DiffusionConfig(denoising_steps=101),
    )
    with pytest.raises(ConfigurationError) as caught:
        config.validate()
    for part in (
        "n_action_steps 16 exceeds horizon - n_obs_steps + 1 = 15",
        "action_state_indices [0, 1] must hold 7",
        "state_noise must be at least 0",
        "hidden_dim 100 does not divide into transformer.num_heads 3",
        "use_rope and transformer.use_positional_encoding exclude each other",
        "crop_shape (80, 64) does not fit into vision.resize_shape (64, 64)",
        "32 channels do not divide into norm_groups 5",
        "denoising_steps must be 1 to 100, got 101",
    ):
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": TransformerConfig(hidden_dim=36, num_heads=4)}, "even width of a head, got 9"),
        ({"action_state_indices": None}, "relative needs action_state_indices"),
        ({"action_state_indices": [0, 1, 2, 3, 4, 5, 7]}, "below 7"),
        ({"output_features": {}}, "exactly one feature of type ACTION"),
        ({"input_features": {}}, "exactly one feature of type STATE"),
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
