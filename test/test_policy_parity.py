"""The architecture is LeRobot's `multi_task_dit`, number for number: same weights and inputs, same outputs."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.multi_task_dit import modeling_multi_task_dit as theirs
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from policy_fixtures import INSTRUCTIONS, make_batch, make_stats, randomize
from transformers import CLIPVisionConfig, CLIPVisionModel

from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    ClipVisionConfig,
    DiffusionConfig,
    Feature,
    FlowMatchingConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.objectives import Diffusion, FlowMatching, masked_mse
from dit_policy_ros.policy.tiny_clip import make_tiny_clip
from dit_policy_ros.policy.transformer import DiffusionTransformer

HORIZON, ACTIONS, CONDITIONING = 12, 5, 23


def their_config(**changes):
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
        their_config(use_rope=rope, use_positional_encoding=learned), CONDITIONING
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
    objective = theirs.DiffusionObjective(their_config(prediction_type=prediction), ACTIONS, HORIZON, masked)
    recorder = Recorder()
    torch.manual_seed(5)
    expected = objective.compute_loss(recorder, batch, None)
    torch.manual_seed(5)
    noise, timestep = torch.randn_like(batch["action"]), torch.randint(0, 100, (6,))
    assert torch.equal(timestep, recorder.timestep)

    noisy, target = Diffusion(DiffusionConfig(prediction_type=prediction)).corrupt(batch["action"], noise, timestep)
    torch.testing.assert_close(noisy, recorder.x, atol=1e-6, rtol=1e-6)
    loss = masked_mse(recorder(noisy, timestep), target, batch["action_is_pad"] if masked else None)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sigma_min", [0.0, 0.05])
def test_flow_matching_loss_is_lerobots(sigma_min):
    batch = {"action": torch.randn(6, HORIZON, ACTIONS), "action_is_pad": torch.rand(6, HORIZON) > 0.6}
    config = their_config(objective="flow_matching", sigma_min=sigma_min, timestep_sampling_strategy="uniform")
    recorder = Recorder()
    torch.manual_seed(5)
    expected = theirs.FlowMatchingObjective(config, ACTIONS, HORIZON, True).compute_loss(recorder, batch, None)
    torch.manual_seed(5)
    noise = torch.randn_like(batch["action"])
    objective = FlowMatching(FlowMatchingConfig(sigma_min=sigma_min, timestep_sampling="uniform"))
    timestep = objective.draw_timesteps(6, torch.device("cpu"))
    noisy, target = objective.corrupt(batch["action"], noise, timestep)
    torch.testing.assert_close(noisy, recorder.x)
    torch.testing.assert_close(masked_mse(recorder(noisy, timestep), target, batch["action_is_pad"]), expected)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """One folder with a tiny text tower, a tiny ViT and a tokenizer, by a name that LeRobot takes for a CLIP's."""
    folder = tmp_path_factory.mktemp("clip")
    make_tiny_clip(folder / "text")
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = CLIPVisionModel(vision)
    randomize(model, seed=3)
    model.save_pretrained(folder / "vision")
    return folder


def lerobot_names(weights, separate):
    """Our tensor names as LeRobot 0.6 with transformers 5.5 has them."""
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("text_encoder.text_encoder.", "text_encoder.text_encoder.text_model.")
        name = name.replace(".model.", ".model.vision_model.")
        if not separate:
            name = name.replace("vision_encoders.0.", "vision_encoder.")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(("separate", "objective"), [(False, "diffusion"), (True, "flow_matching")])
def test_whole_policy_acts_as_lerobots(clip_folder, separate, objective):
    """Two cameras, CLIP vision and text: the conditioning, and the actions from the same noise."""
    features = {
        "observation.images.wrist": ("VISUAL", (3, 40, 40)),
        "observation.images.front": ("VISUAL", (3, 40, 40)),  # not in alphabetical order
        "observation.state": ("STATE", (7,)),
    }
    vision = ClipVisionConfig(
        resize_shape=None,
        crop_shape=(32, 32),
        backbone=str(clip_folder / "vision"),
        use_separate_encoder_per_camera=separate,
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 1.0, 1.0),
    )
    config = PolicyConfig(
        horizon=HORIZON,
        n_action_steps=4,
        input_features={key: Feature(kind, shape) for key, (kind, shape) in features.items()},
        output_features={"action": Feature("ACTION", (ACTIONS,))},
        normalization_mapping={"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"},
        observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(str(clip_folder / "text"))),
        transformer=TransformerConfig(hidden_dim=32, num_layers=3, num_heads=4),
        objective=DiffusionConfig(denoising_steps=100, sampler="ddpm")
        if objective == "diffusion"
        else FlowMatchingConfig(denoising_steps=7),
    )
    policy = MultitaskDiTPolicy(config, make_stats(config)).eval()
    randomize(policy.noise_predictor)
    their_features = {key: PolicyFeature(FeatureType[kind], shape) for key, (kind, shape) in features.items()}
    other = theirs.MultiTaskDiTPolicy(
        their_config(
            input_features=their_features,
            objective=objective,
            num_integration_steps=7,
            use_separate_rgb_encoder_per_camera=separate,
            image_crop_shape=(32, 32),
            vision_encoder_name=str(clip_folder / "vision"),
            text_encoder_name=str(clip_folder / "text"),
        )
    ).eval()
    other.load_state_dict(lerobot_names(policy.state_dict(), separate), strict=True)

    batch = make_batch(config, size=2)
    pixels = {key: batch[key].float() / 255 for key in config.cameras}
    tokens = policy.observation_encoder.text_encoder.tokenizer(INSTRUCTIONS[:2], return_tensors="pt")
    theirs_batch = {
        "observation.state": batch["observation.state"],
        "observation.images": torch.stack([pixels[key] for key in config.cameras], dim=2),
        "observation.language.tokens": tokens["input_ids"],
        "observation.language.attention_mask": tokens["attention_mask"],
    }
    with torch.no_grad():
        expected = other.observation_encoder.encode(theirs_batch)
        conditioning = policy.encode(batch)
        torch.testing.assert_close(conditioning, expected, atol=1e-5, rtol=0)
        torch.manual_seed(9)
        expected = other.objective.conditional_sample(other.noise_predictor, 2, expected)
        torch.manual_seed(9)
        actions = policy.sample(conditioning)
    torch.testing.assert_close(actions, expected, atol=1e-5, rtol=0)
