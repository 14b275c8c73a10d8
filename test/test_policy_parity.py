"""The architecture is LeRobot's `multi_task_dit`, number for number: same weights and inputs, same outputs."""

import functools
import json

import draccus
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.multi_task_dit import modeling_multi_task_dit as theirs
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot_fixtures import (
    ACTIONS,
    HORIZON,
    make_clip,
    make_observations,
    their_actions,
    their_config,
    their_policy,
    their_stats,
)
from policy_fixtures import randomize
from transformers import AutoTokenizer

from dit_policy_ros.policy.configuration import DiffusionConfig, FlowMatchingConfig, TransformerConfig
from dit_policy_ros.policy.engine import PolicyEngine
from dit_policy_ros.policy.interop import configurations, tensor_names
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.objectives import Diffusion, FlowMatching, squared_error
from dit_policy_ros.policy.transformer import DiffusionTransformer

CONDITIONING = 23


def parts_config(**changes):
    """For parts of LeRobot's policy that are compared alone."""
    settings = {
        "input_features": {"observation.state": PolicyFeature(FeatureType.STATE, (7,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))},
        "horizon": HORIZON,
        "n_action_steps": 4,
        "hidden_dim": 32,
        "num_layers": 3,
        "num_heads": 4,
        "device": "cpu",
    }
    return MultiTaskDiTConfig(**(settings | changes))


@pytest.mark.parametrize(("rope", "learned"), [(True, False), (False, True), (False, False)])
def test_transformer_predicts_what_lerobots_does(rope, learned):
    theirs_net = theirs.DiffusionTransformer(
        parts_config(use_rope=rope, use_positional_encoding=learned), CONDITIONING
    ).eval()
    config = TransformerConfig(hidden_dim=32, num_layers=3, num_heads=4, use_rope=rope, use_positional_encoding=learned)
    ours = DiffusionTransformer(config, ACTIONS, HORIZON, CONDITIONING).eval()
    randomize(ours)
    theirs_net.load_state_dict(ours.state_dict(), strict=True)
    x, conditioning = torch.randn(4, HORIZON, ACTIONS), torch.randn(4, CONDITIONING)
    for timestep in (torch.tensor([0, 1, 50, 99]), torch.tensor([0.0, 0.25, 0.5, 0.999])):
        expected = theirs_net(x, timestep, conditioning_vec=conditioning)
        torch.testing.assert_close(ours(x, timestep, conditioning), expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.01  # the comparison is of something


class Recorder(torch.nn.Module):
    """Stands for a transformer: keeps what it was given, predicts a fixed function of it."""

    def forward(self, x, timestep, conditioning_vec=None):
        self.x, self.timestep = x, timestep
        return torch.sin(x) + 0.1


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("masked", [True, False])
def test_diffusion_loss_is_lerobots(prediction, masked):
    batch = {"action": torch.randn(6, HORIZON, ACTIONS), "action_is_pad": torch.rand(6, HORIZON) > 0.6}
    objective = theirs.DiffusionObjective(parts_config(prediction_type=prediction), ACTIONS, HORIZON, masked)
    recorder = Recorder()
    torch.manual_seed(5)
    expected = objective.compute_loss(recorder, batch, None)
    torch.manual_seed(5)
    noise, timestep = torch.randn_like(batch["action"]), torch.randint(0, 100, (6,))
    assert torch.equal(timestep, recorder.timestep)

    noisy, target = Diffusion(DiffusionConfig(prediction_type=prediction)).corrupt(batch["action"], noise, timestep)
    torch.testing.assert_close(noisy, recorder.x, atol=1e-6, rtol=1e-6)
    loss = squared_error(recorder(noisy, timestep), target, batch["action_is_pad"] if masked else None).mean
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sigma_min", [0.0, 0.05])
def test_flow_matching_loss_is_lerobots(sigma_min):
    batch = {"action": torch.randn(6, HORIZON, ACTIONS), "action_is_pad": torch.rand(6, HORIZON) > 0.6}
    config = parts_config(objective="flow_matching", sigma_min=sigma_min, timestep_sampling_strategy="uniform")
    recorder = Recorder()
    torch.manual_seed(5)
    expected = theirs.FlowMatchingObjective(config, ACTIONS, HORIZON, True).compute_loss(recorder, batch, None)
    torch.manual_seed(5)
    noise = torch.randn_like(batch["action"])
    objective = FlowMatching(FlowMatchingConfig(sigma_min=sigma_min, timestep_sampling="uniform"))
    timestep = objective.draw_timesteps(6, torch.device("cpu"))
    noisy, target = objective.corrupt(batch["action"], noise, timestep)
    torch.testing.assert_close(noisy, recorder.x)
    torch.testing.assert_close(squared_error(recorder(noisy, timestep), target, batch["action_is_pad"]).mean, expected)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """One folder with a tiny CLIP, by a name that LeRobot takes for a CLIP's."""
    return make_clip(tmp_path_factory.mktemp("clip"))


POSITIONS = {
    "rope": {"use_rope": True, "use_positional_encoding": False},
    "learned": {"use_rope": False, "use_positional_encoding": True},
    "neither": {"use_rope": False, "use_positional_encoding": False},
}
SAMPLERS = {
    "diffusion": {"ddpm": {"noise_scheduler_type": "DDPM"}, "ddim": {"noise_scheduler_type": "DDIM"}},
    "flow_matching": {"euler": {"integration_method": "euler"}, "rk4": {"integration_method": "rk4"}},
}


@functools.cache
def tokenizer_in(folder):
    return AutoTokenizer.from_pretrained(folder)


def same_policy(theirs_policy, stats):
    """Ours with the weights, the configuration and the statistics of LeRobot's."""
    config = theirs_policy.config
    weights, dropped = tensor_names.from_lerobot(theirs_policy.state_dict())
    assert not dropped
    encoder = theirs_policy.observation_encoder
    towers = [encoder.vision_encoder, *(encoder.vision_encoders or [])]
    vision = next((tower.model.config.to_dict() for tower in towers if tower is not None), None)
    mapped = configurations.from_lerobot(
        json.loads(json.dumps(draccus.encode(config, PreTrainedConfig))),
        configurations.Normalization({kind: mode.value for kind, mode in config.normalization_mapping.items()}, stats),
        vision,
        encoder.text_encoder.text_encoder.config.to_dict(),
    )
    policy = MultitaskDiTPolicy(mapped.config, mapped.stats, tokenizer_in(config.text_encoder_name)).eval()
    policy.load_state_dict(weights, strict=True)
    return policy


def our_actions(policy, observations, seed):
    """A chunk, its noise drawn as LeRobot draws it: (B, steps, A), in units."""
    torch.manual_seed(seed)
    return policy.predict_chunk(observations)


# With no camera there is nothing to separate; with one, a separate encoder still has other tensor names.
CAMERAS = [(0, False), (1, False), (1, True), (3, False), (3, True)]


@pytest.mark.parametrize("n_obs_steps", [1, 2, 3])
@pytest.mark.parametrize(("cameras", "separate"), CAMERAS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("objective", SAMPLERS)
def test_policy_acts_as_lerobots(clip, objective, position, cameras, separate, n_obs_steps):
    """From a dataset's batch to actions in units, each through its own processors: same weights, same noise.

    The whole grid, nothing thinned out, by the plain policy and by its engine. Actions are of size 1 (deviation 0.5
    to 3), as real ones are once they are normalised; fp32 resolves 1e-7 of that.
    """
    stats = their_stats(cameras)
    settings = {
        "objective": objective,
        "n_obs_steps": n_obs_steps,
        "use_separate_rgb_encoder_per_camera": separate,
        **POSITIONS[position],
    }
    other = their_policy(their_config(clip, cameras, **settings))
    observations = make_observations(other.config)
    processors = make_pre_post_processors(other.config, dataset_stats=stats)
    for sampler, choice in SAMPLERS[objective].items():
        config = other.config = their_config(clip, cameras, **settings, **choice)
        other.objective = type(other.objective)(config, ACTIONS, HORIZON)
        policy = same_policy(other, stats)
        assert policy.config.objective.sampler == sampler
        expected = their_actions(other, processors, observations, seed=9)
        actual = our_actions(policy, observations, seed=9)
        assert actual.shape == (2, HORIZON - n_obs_steps + 1, ACTIONS)
        assert 0.5 < expected.std() < 3
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        fast = our_actions(PolicyEngine(policy), observations, seed=9)
        assert not torch.equal(fast, actual)  # other arithmetic
        torch.testing.assert_close(fast, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_sample": False, "prediction_type": "sample", "noise_scheduler_type": "DDIM"},
        {"clip_sample_range": 0.5},
        {"num_inference_steps": None, "num_train_timesteps": 20},
        {"image_resize_shape": (36, 48)},
        {"image_resize_shape": (32, 32), "image_crop_shape": None},
        {"image_resize_shape": (32, 32), "image_crop_shape": (224, 224)},  # LeRobot does not crop then
        {"objective": "flow_matching", "sigma_min": 0.05, "num_integration_steps": 7},
        {"horizon": 13, "n_action_steps": 3},
        {"normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.MEAN_STD)},
        {"normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_each_other_choice_of_lerobot_is_a_value_of_our_configuration(clip, changes):
    stats = their_stats()
    config = their_config(clip, **changes)
    other = their_policy(config)
    observations = make_observations(config)
    expected = their_actions(other, make_pre_post_processors(config, dataset_stats=stats), observations, seed=9)
    actual = our_actions(same_policy(other, stats), observations, seed=9)[:, : config.n_action_steps]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_constant_dimensions_are_what_lerobot_makes_of_them(clip):
    """State and action dimension 2 never moved: LeRobot's processors give -1 and take it back to the constant."""
    stats = their_stats()
    for key in ("observation.state", "action"):
        stats[key]["min"][2] = stats[key]["max"][2] = 0.25
    config = their_config(clip)
    other = their_policy(config)
    observations = make_observations(config)
    observations["observation.state"][..., 2] = 0.25
    expected = their_actions(other, make_pre_post_processors(config, dataset_stats=stats), observations, seed=9)
    actual = our_actions(same_policy(other, stats), observations, seed=9)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert torch.equal(actual[..., 2], torch.full_like(actual[..., 2], 0.25))


def test_padding_of_instructions_does_not_matter(clip):
    """LeRobot pads each instruction to 77 tokens; here none is padded: CLIP's attention is causal."""
    config = their_config(clip, cameras=0)
    other = their_policy(config)
    observations = make_observations(config, batch=3)
    observations["task"] = ["push", "push the red block over the line", "x" * 30]
    before, _ = make_pre_post_processors(config, dataset_stats=their_stats(0))
    with torch.no_grad():  # of size 20; a chunk of a random policy may magnify its rounding
        expected = other.observation_encoder.encode(other._prepare_batch(before(dict(observations))))
        actual = same_policy(other, their_stats(0)).encode(observations)
    torch.testing.assert_close(actual, expected, atol=4e-5, rtol=0)
