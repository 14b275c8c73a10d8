"""Small policies and batches for the policy's tests. No files, no network."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dit_policy_ros.policy.configuration import (
    ClipTextConfig,
    Feature,
    FlowMatchingConfig,
    ObservationEncoderConfig,
    PolicyConfig,
    ResNetConfig,
    TransformerConfig,
)

INSTRUCTIONS = [f"push the {colour} block over the line" for colour in ("red", "green", "blue")]


def demo_config(text_model: str, **changes: Any) -> PolicyConfig:
    """The recipe of the demo: two 64-pixel cameras, 7 joints, keypoints with FiLM, flow matching, relative actions."""
    settings: dict[str, Any] = {
        "n_obs_steps": 1,
        "horizon": 16,
        "n_action_steps": 8,
        "action_mode": "relative",
        "action_state_indices": list(range(7)),
        "input_features": {
            "observation.images.workspace": Feature("VISUAL", (3, 128, 128)),
            "observation.images.wrist": Feature("VISUAL", (3, 128, 128)),
            "observation.state": Feature("STATE", (7,)),
        },
        "output_features": {"action": Feature("ACTION", (7,))},
        "observation_encoder": ObservationEncoderConfig(ResNetConfig(), ClipTextConfig(text_model)),
        "transformer": TransformerConfig(
            hidden_dim=128, num_layers=4, num_heads=4, dropout=0.0, timestep_embed_dim=128
        ),
        "objective": FlowMatchingConfig(denoising_steps=5, noise_draws=2),
    }
    return PolicyConfig(**(settings | changes))


def make_stats(config: PolicyConfig) -> dict[str, dict[str, list[float]]]:
    """Statistics of state and action with another range in each dimension."""

    def of(dim: int, span: float) -> dict[str, list[float]]:
        low = [-span * (1 + i) for i in range(dim)]
        high = [span * (2 + i) for i in range(dim)]
        return {
            "min": low,
            "max": high,
            "mean": [0.1 * i for i in range(dim)],
            "std": [span * (1 + i) for i in range(dim)],
        }

    stats = {
        key: of(feature.shape[0], 1.0) for key, feature in config.input_features.items() if len(feature.shape) == 1
    }
    return stats | {"action": of(config.action_dim, 0.1)}


def make_batch(config: PolicyConfig, size: int = 2, seed: int = 0) -> dict[str, Any]:
    """A random training batch as the dataset gives it."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    batch: dict[str, Any] = {
        key: torch.from_numpy(rng.integers(0, 256, (size, config.n_obs_steps, 3, *shape), dtype=np.uint8))
        for key, shape in config.cameras.items()
    }
    for key, feature in config.input_features.items():
        if len(feature.shape) == 1:
            batch[key] = normal(size, config.n_obs_steps, *feature.shape)
    batch["action"] = normal(size, config.horizon, config.action_dim)
    batch["action_is_pad"] = torch.zeros(size, config.horizon, dtype=torch.bool)
    batch["task"] = [INSTRUCTIONS[i % 3] for i in range(size)]
    return batch


def randomize(module: torch.nn.Module, seed: int = 0, keep: Callable[[str], bool] = lambda name: False) -> None:
    """Gives every parameter random values: adaLN-Zero's zeros would hide most of the model from a test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not keep(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
