"""LeRobot's own `multi_task_dit` in tiny sizes, as an oracle: policies, processors, folders as its code saves them."""

import json
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy
from policy_fixtures import INSTRUCTIONS, randomize
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel

from dit_policy_ros.policy.tiny_clip import make_tiny_clip

HORIZON, ACTIONS, STATES = 8, 5, 7
CAMERAS = ["observation.images.wrist", "observation.images.front", "observation.images.above"]  # not alphabetical


def make_clip(folder: Path, image_size: int = 32, **vision: Any) -> Path:
    """A tiny CLIP, both towers and tokenizer in one folder, as CLIPModel.save_pretrained leaves it."""
    make_tiny_clip(folder)
    text = load_file(folder / "model.safetensors")
    settings: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 8,
    }
    config = CLIPVisionConfig(**(settings | vision))
    tower = CLIPVisionModel(config)
    randomize(tower, seed=3)
    text_config = json.loads((folder / "config.json").read_text())
    CLIPConfig(text_config=text_config, vision_config=config.to_dict()).save_pretrained(folder)
    save_file(text | tower.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def their_config(clip: Path, cameras: int = 2, **changes: Any) -> MultiTaskDiTConfig:
    """A tiny LeRobot configuration; pictures of 40 x 40 pixels, of which the encoder sees 32 x 32."""
    features = {key: PolicyFeature(FeatureType.VISUAL, (3, 40, 40)) for key in CAMERAS[:cameras]}
    n_obs = changes.get("n_obs_steps", 2)
    settings: dict[str, Any] = {
        "input_features": features | {"observation.state": PolicyFeature(FeatureType.STATE, (STATES,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))},
        "horizon": HORIZON,
        "n_action_steps": HORIZON - n_obs + 1,
        "hidden_dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "timestep_embed_dim": 32,
        "num_inference_steps": 10,
        "num_integration_steps": 5,
        "image_crop_shape": (32, 32),
        "vision_encoder_name": str(clip),
        "text_encoder_name": str(clip),
        "device": "cpu",
    }
    return MultiTaskDiTConfig(**(settings | changes))


def their_policy(config: MultiTaskDiTConfig, seed: int = 0) -> MultiTaskDiTPolicy:
    """A LeRobot policy that predicts things of the size of normalised actions, in evaluation mode."""
    torch.manual_seed(seed)  # of what is not randomized below: rounding grows with some projections
    policy = MultiTaskDiTPolicy(config).eval()
    randomize(policy.noise_predictor, seed)
    with torch.no_grad():  # random blocks give activations of size 10; actions are of size 1
        policy.noise_predictor.output_proj.weight.mul_(0.3)
    return policy


def their_stats(cameras: int = 2) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics of a dataset: another range in each dimension; the same picture statistics for every camera."""

    def of(dim: int, span: float) -> dict[str, torch.Tensor]:
        step = torch.arange(dim).float()
        return {
            "min": -span * (1 + 0.1 * step),
            "max": span * (1.3 + 0.1 * step),
            "mean": 0.1 * step,
            "std": span * (1 + 0.1 * step),
        }

    stats = {"observation.state": of(STATES, 1.0), "action": of(ACTIONS, 1.0)}
    for key in CAMERAS[:cameras]:
        stats[key] = {
            "mean": torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
            "std": torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
        }
    return stats


def save_theirs(folder: Path, policy: MultiTaskDiTPolicy, stats: dict[str, Any]) -> Path:
    """A `pretrained_model` folder, written by LeRobot's own code."""
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(policy.config, dataset_stats=stats):
        processor.save_pretrained(folder)
    return folder


def make_observations(config: MultiTaskDiTConfig, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """A batch as LeRobot's dataset gives it: pictures float in [0, 1], state in units, a task each."""
    generator = torch.Generator().manual_seed(seed)
    steps = config.n_obs_steps
    observations: dict[str, Any] = {
        key: torch.randint(0, 256, (batch, steps, *feature.shape), generator=generator) / 255
        for key, feature in config.image_features.items()
    }
    observations["observation.state"] = torch.randn(batch, steps, STATES, generator=generator)
    observations["task"] = [INSTRUCTIONS[i % 3] for i in range(batch)]
    return observations


@torch.no_grad()
def their_actions(policy: MultiTaskDiTPolicy, processors: Any, observations: dict[str, Any], seed: int) -> torch.Tensor:
    """What LeRobot does with a batch of observations from a seed: (B, n_action_steps, A), in units."""
    before, after = processors
    batch = policy._prepare_batch(before(dict(observations)))
    torch.manual_seed(seed)
    return after(policy._generate_actions(batch))


def default_normalization() -> dict[str, NormalizationMode]:
    """LeRobot's."""
    return {
        "VISUAL": NormalizationMode.MEAN_STD,
        "STATE": NormalizationMode.MIN_MAX,
        "ACTION": NormalizationMode.MIN_MAX,
    }
